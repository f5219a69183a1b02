"""Contact sheets of what a model of a config sees: crops, masks, operations, channels, evaluation crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import (
    DataError,
    ImageDataset,
    LabelledStream,
    MultiCrop,
    SingleCrop,
    TrainingStream,
    build_test_loader,
    build_train_loader,
)
from dinoengine.data.augmentation import draw_crop_box
from dinoengine.data.build import build_mask_plan
from dinoengine.data.channels import Channels, ImageFormat, image_format, in_format, size_of
from dinoengine.data.collate import CropSample
from dinoengine.data.contact_sheet import Row, Tile, contact_sheet
from dinoengine.data.crop_backends import render_crops
from dinoengine.data.crop_recipe import CropRecipe, by_channels, to_tensor
from dinoengine.data.decoded_batch import made_crops
from dinoengine.data.display import Display, class_colours, with_masked_patches
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.utils.printable import printable

_GLOBAL_BOX, _LOCAL_BOX = (235, 87, 38), (45, 125, 210)
_NUM_STEPS = 5
_MAX_CHANNELS_SHOWN = 12


class _Seen:
    """The first images of a run, and how tensors are shown: normalised as the model does, and the normalisation undone."""

    def __init__(self, cfg: CfgNode, num_images: int) -> None:
        loader = build_train_loader(cfg, rank=0, world_size=1, replace_bad_images=True)
        stream: Any = loader.dataset
        self.stream: TrainingStream = stream.stream if isinstance(stream, LabelledStream) else stream
        self.cfg = cfg
        self.format = image_format(cfg)
        self.norm = PixelNorm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        positions = range(min(num_images, len(self.stream.dataset)))
        self.samples: list[CropSample] = [self.stream[position] for position in positions]
        self.global_crops = [made_crops(s.global_crops) for s in self.samples]
        self.local_crops = [made_crops(s.local_crops) for s in self.samples]
        self.images = [_stored(self.stream.dataset, s.image_index, self.format) for s in self.samples]
        self.display = Display(self.format, [_whole(image) for image in self.images])

    def normalised(self, crops: Sequence[Tensor]) -> Tensor:
        """[B, C, H, W] as the backbone gets it."""
        return self.norm(torch.stack(list(crops)))

    def shown(self, crop: Tensor) -> np.ndarray:
        """[H, W, 3] uint8."""
        pixels = self.normalised([crop]) * self.norm.pixel_std + self.norm.pixel_mean
        return self.display.pixels(pixels[0])

    def label(self, sample: CropSample) -> tuple[str, list[str]]:
        name = self.stream.dataset.describe(sample.image_index)
        label = self.stream.dataset.label(sample.image_index)
        names = self.stream.dataset.class_names
        told = (
            [f"label {names[label]}"] if self.cfg.MODEL.CLASSIFIER.NUM_CLASSES and names and label is not None else []
        )
        replaced = [f"in place of {len(sample.bad_images)} bad image(s)"] if sample.bad_images else []
        return f"position {sample.position}", [_end_of(name), *told, *replaced]


def make_sheets(cfg: CfgNode, num_images: int = 6) -> dict[str, Any]:
    """Name -> ``PIL.Image``: the first images of the run, cropped, masked and normalised as the run will do it.

    "crops", "masks" (if the objective has them), "operations" (of MultiCrop and SingleCrop), "channels" (of INPUT.FORMAT
    channels with several), "evaluation" (of the first dataset of DATASETS.TEST, if there is one).

    Raises:
        ValueError, KeyError, OSError, DataError: if a dataset cannot be made or an image not be loaded.
    """
    if num_images < 1:
        raise ValueError(f"The number of images must be 1 or more, got {num_images}.")
    seen = _Seen(cfg, num_images)
    sheets = {"crops": _crops_sheet(seen)}
    plan = None if cfg.MODEL.CLASSIFIER.NUM_CLASSES else build_mask_plan(cfg)
    if plan is not None:
        sheets["masks"] = _masks_sheet(seen, plan.masks([sample.position for sample in seen.samples]))
    if isinstance(seen.stream.augmentation, (MultiCrop, SingleCrop)):
        sheets["operations"] = _operations_sheet(seen, seen.stream.augmentation)
    if isinstance(seen.format, Channels) and seen.format.count > 1:
        sheets["channels"] = _channels_sheet(seen, seen.format.count)
    if cfg.DATASETS.TEST:
        sheets["evaluation"] = _evaluation_sheet(seen, num_images)
    return sheets


def _crops_sheet(seen: _Seen) -> Any:
    rows = []
    for sample, image, first, others in zip(
        seen.samples, seen.images, seen.global_crops, seen.local_crops, strict=True
    ):
        crops = [*first, *others]
        size = "{1} x {0} pixels".format(*size_of(image))
        tiles = [Tile(seen.shown(_whole(image)), size, _frames(seen.stream, sample, size_of(image)))]
        tiles += [Tile(seen.shown(crop), f"{crop.shape[2]} x {crop.shape[1]}") for crop in crops]
        rows.append(Row(*seen.label(sample), tiles))
    columns = ["image", *(f"global {i + 1}" for i in range(len(seen.global_crops[0])))]
    columns += [f"local {i + 1}" for i in range(len(seen.local_crops[0]))]
    backend = seen.cfg.INPUT.AUGMENTATION_BACKEND
    notes = [
        f"The first images of the run as it will see them, normalisation undone; backend {backend}, seed {seen.cfg.SEED}.",
        "Boxes: where global (orange) and local crops (blue) are from." if rows[0].tiles[0].frames else "",
        _statistics(seen),
        seen.display.describe(),
    ]
    return contact_sheet(f"Crops: {seen.cfg.INPUT.AUGMENTATION}", notes, rows, columns)


def _statistics(seen: _Seen) -> str:
    """Mean and deviation of what the backbone gets: about 0 and 1 if PIXEL_MEAN and PIXEL_STD fit the images."""
    values = torch.cat([seen.normalised(crops).transpose(0, 1).flatten(1) for crops in seen.global_crops], dim=1)
    means, deviations = (", ".join(f"{v:.2f}" for v in stat) for stat in (values.mean(1), values.std(1)))
    return (
        f"Global crops after normalisation: mean {means}; standard deviation {deviations}. About 0 and 1 if "
        "MODEL.PIXEL_MEAN and PIXEL_STD fit the images."
    )


def _frames(stream: TrainingStream, sample: CropSample, size: tuple[int, int]) -> list[tuple[Any, Any]]:
    """(colour, box) of each crop in its image of ``size`` (rows, columns)."""
    augmentation = stream.augmentation
    if not isinstance(augmentation, MultiCrop):
        return []
    recipes = augmentation.recipes(size, position_rng(stream.seed, sample.position, CROPS))
    num_global = len(augmentation.global_views)
    return [(_GLOBAL_BOX if i < num_global else _LOCAL_BOX, recipe.box) for i, recipe in enumerate(recipes)]


def _masks_sheet(seen: _Seen, masks: np.ndarray) -> Any:
    """``masks``: [views * images, patches] bool, all first views before all second ones."""
    size, patch = seen.cfg.INPUT.GLOBAL_CROPS.SIZE_PX, seen.cfg.MODEL.VIT.PATCH_SIZE_PX
    grid = size[0] // patch, size[-1] // patch
    by_view = masks.reshape(-1, len(seen.samples), *grid)
    rows = []
    for number, sample in enumerate(seen.samples):
        tiles = []
        for crop, mask in zip(seen.global_crops[number], by_view[:, number], strict=True):
            share = f"{mask.sum()} of {mask.size} patches ({mask.mean():.0%})" if mask.any() else "no mask"
            tiles.append(Tile(with_masked_patches(seen.shown(crop), mask), share))
        rows.append(Row(*seen.label(sample), tiles))
    settings = seen.cfg.INPUT.MASK
    notes = [
        f"Dark patches: the student sees the mask token. {settings.CROP_SHARE:.0%} of the global crops of a batch are "
        f"masked, {settings.RATIO[0]:.0%} to {settings.RATIO[1]:.0%} of their patches (INPUT.MASK); a patch has "
        f"{patch} x {patch} pixels, a crop {grid[0]} rows of {grid[1]}.",
    ]
    return contact_sheet("Masks", notes, rows, [f"global {i + 1}" for i in range(len(by_view))], edge=224)


def _operations_sheet(seen: _Seen, augmentation: MultiCrop | SingleCrop) -> Any:
    image = seen.images[0]
    view = augmentation if isinstance(augmentation, SingleCrop) else augmentation.global_views[0]
    edge = min(size_of(image))
    box = ((size_of(image)[0] - edge) // 2, (size_of(image)[1] - edge) // 2, edge, edge)
    whole = CropRecipe(box, view.size)
    rng = position_rng(seen.stream.seed, seen.samples[0].position, CROPS)
    boxes = [draw_crop_box(size_of(image), view.scale, augmentation.crop_ratio, rng) for _ in range(_NUM_STEPS)]
    area = size_of(image)[0] * size_of(image)[1]
    drawn = [(replace(whole, box=b), f"{b[2] * b[3] / area:.0%} of the area") for b in boxes]
    operations = [("crop", [f"{view.scale[0]:.0%} to {view.scale[1]:.0%} of the area"], drawn)]
    flips = [(whole, "off"), (replace(whole, flip=True), "on")]
    operations.append(("flip", [_probability(augmentation.hflip_prob)], flips if augmentation.hflip_prob else []))
    if isinstance(augmentation, MultiCrop):
        operations += _colour_operations(augmentation, whole)
    rows = []
    for name, lines, recipes in operations:
        crops = render_crops(image, [recipe for recipe, _ in recipes], augmentation.backend)
        tiles = [Tile(seen.shown(crop), text) for crop, (_, text) in zip(crops, recipes, strict=True)]
        rows.append(Row(name, lines, tiles))
    notes = [
        f"Each operation alone, over its range, on {_end_of(seen.stream.dataset.describe(seen.samples[0].image_index))}. "
        f"Backend {augmentation.backend}.",
        seen.display.describe(),
    ]
    return contact_sheet("Operations", notes, rows)


def _colour_operations(
    augmentation: MultiCrop, whole: CropRecipe
) -> Iterator[tuple[str, list[str], list[tuple[CropRecipe, str]]]]:
    """(name, what is said of it, recipes with captions) of each; without recipes where it is off."""
    jitter, is_colour = augmentation.color_jitter, augmentation.image_format in ("RGB", "RGBA")
    for name in ("brightness", "contrast", "saturation", "hue"):
        strength = getattr(jitter, name)
        middle = 0.0 if name == "hue" else 1.0
        low = middle - strength if name == "hue" else max(0.0, middle - strength)
        steps = np.linspace(low, middle + strength, _NUM_STEPS).tolist()
        recipes = [(replace(whole, jitter=((name, step),)), f"{step:.2f}") for step in steps]
        if not is_colour and name in ("saturation", "hue"):
            yield name, ["left out: it needs colours"], []
        else:
            is_on = strength > 0 and jitter.prob > 0
            yield name, ["colour jitter", _probability(jitter.prob if is_on else 0)], recipes if is_on else []
    greys = [(whole, "off"), (replace(whole, grey=True), "on")]
    lines = [_probability(augmentation.grayscale_prob)] if is_colour else ["left out: it needs colours"]
    yield "grey", lines, greys if is_colour and augmentation.grayscale_prob else []
    views = [*augmentation.global_views, augmentation.local_view]
    sigmas = np.linspace(*augmentation.blur_sigma, _NUM_STEPS).tolist()
    blurs = [(replace(whole, blur=(augmentation.blur_kernel, sigma)), f"sigma {sigma:.2f}") for sigma in sigmas]
    probabilities = [view.blur_prob for view in views]
    yield "blur", _probabilities(probabilities), blurs if any(probabilities) else []
    inverted = [(whole, "off"), (replace(whole, solarize=augmentation.solarize_threshold), "on")]
    probabilities = [view.solarize_prob for view in views]
    yield "solarize", _probabilities(probabilities), inverted if any(probabilities) else []


def _channels_sheet(seen: _Seen, count: int) -> Any:
    shown = range(min(count, _MAX_CHANNELS_SHOWN))
    rows = []
    for sample, crops in zip(seen.samples, seen.global_crops, strict=True):
        crop = crops[0].float()
        tiles = [
            Tile(seen.display.channel(crop, c), f"mean {crop[c].mean():.3f} std {crop[c].std():.3f}") for c in shown
        ]
        rows.append(Row(*seen.label(sample), tiles))
    which = f"The first {len(shown)} channels" if len(shown) < count else "Each channel"
    notes = [
        f"{which} of the first global crop alone, in grey. "
        "Captions: values before normalisation, 0 to 1 over INPUT.VALUE_RANGE "
        f"{tuple(seen.cfg.INPUT.VALUE_RANGE)}.",
        seen.display.describe(),
    ]
    return contact_sheet("Channels", notes, rows, [f"channel {c}" for c in shown])


def _evaluation_sheet(seen: _Seen, num_images: int) -> Any:
    name = seen.cfg.DATASETS.TEST[0]
    crops: Any = build_test_loader(seen.cfg, name).dataset
    chosen = np.linspace(0, len(crops) - 1, min(num_images, len(crops))).round().astype(int).tolist()
    rows = []
    for index in chosen:
        stored, found = _stored(crops.dataset, index, seen.format), crops[index]
        tiles = [Tile(seen.shown(_whole(stored)), "{1} x {0} pixels".format(*size_of(stored)))]
        tiles.append(Tile(seen.shown(found.image), f"{found.image.shape[2]} x {found.image.shape[1]}"))
        if found.mask is not None:
            tiles.append(Tile(class_colours(found.mask.numpy()), f"{len(found.mask.unique())} value(s)"))
        names = crops.dataset.class_names
        told = [f"label {names[found.label]}"] if names and found.label is not None else []
        rows.append(Row(f"image {index}", [_end_of(crops.dataset.describe(index)), *told], tiles))
    test = seen.cfg.INPUT.TEST
    resized = f"shorter side to {test.RESIZE_PX} pixels, then the centre" if test.RESIZE_PX else "the centre"
    notes = [f"{name}: {resized} (INPUT.TEST).", seen.display.describe()]
    columns = ["image", "evaluation crop", *(["classes"] if crops.dataset.mask_class_names else [])]
    return contact_sheet("Evaluation", notes, rows, columns, edge=224)


def _stored(dataset: ImageDataset, index: int, wanted: ImageFormat) -> Any:
    """The whole image at ``index``, as ``in_format`` gives it."""
    try:
        return in_format(dataset.load(index), wanted)
    except ValueError as error:
        raise DataError(f"{printable(dataset.describe(index))} cannot be shown: {error}") from error


def _whole(image: Any) -> Tensor:
    """What ``in_format`` gives as a tensor [C, H, W] float in 0..1."""
    tensor = by_channels(image, to_tensor)
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


def _probability(value: float) -> str:
    return f"{value:.0%} of the crops" if value else "off"


def _probabilities(values: Sequence[float]) -> list[str]:
    names = ("global 1", "global 2", "local")
    return [f"{name}: {value:.0%}" for name, value in zip(names, values, strict=True)] if any(values) else ["off"]


def _end_of(name: str, letters: int = 60) -> str:
    name = printable(name)
    return name if len(name) <= letters else f"...{name[-letters:]}"
