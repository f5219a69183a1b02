"""Multi-crop augmentation, operation for operation the published one, and the evaluation crop.

Parameters are drawn from the generator that is passed in, never from a global one: the crops of a position are the same
in every process. Drawing them is one step (``CropRecipe``), following them another, which a backend does. Images stay
uint8; the model normalises them on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dinoengine.config import CfgNode, configurable
from dinoengine.data.channels import COLOUR_FORMATS, ImageFormat, image_format, in_format, size_of
from dinoengine.data.crop_backends import checked_backend, worker_crops
from dinoengine.data.crop_recipe import CropRecipe, by_channels, to_tensor
from dinoengine.data.crop_tables import Crop
from dinoengine.data.reduced_decode import largest_factor, scaled, whole_size
from dinoengine.utils.registry import Registry

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = """Name -> a class called as ``(cfg)``, picklable.

Its instances map an image as a dataset loads it (see ``channels.in_format``) and a ``numpy.random.Generator`` to ``(global
crops, local crops)``: two lists of tensors [C, H, W], uint8 or float in 0..1, or of ``PendingCrop``; all global crops of
one size, all local crops of one size.
"""

_CROP_TRIES = 10


@dataclass(frozen=True)
class ViewSettings:
    """What one kind of view differs in.

    Attributes:
        size: (rows, columns) in pixels.
        scale: smallest and largest share of the image area.
        blur_prob, solarize_prob: effective probabilities.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    blur_prob: float
    solarize_prob: float


@dataclass(frozen=True)
class ColorJitterSettings:
    """Probability, and strengths as in torchvision's ColorJitter."""

    prob: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


@AUGMENTATION_REGISTRY.register()
class MultiCrop:
    """Two global views and n local views of one image (SwAV, arXiv:2006.09882; settings of DINOv2).

    Each view: random resized crop (bicubic), flip, colour jitter in random order, grey, blur, solarize.
    """

    @configurable
    def __init__(
        self,
        *,
        image_format: ImageFormat,
        global_views: list[ViewSettings],
        local_view: ViewSettings,
        num_local: int,
        crop_ratio: tuple[float, float],
        hflip_prob: float,
        color_jitter: ColorJitterSettings,
        grayscale_prob: float,
        blur_kernel: int,
        blur_sigma: tuple[float, float],
        solarize_threshold: int,
        backend: str = "reference",
        reduced_decode: bool = False,
    ) -> None:
        """
        Args:
            image_format: with other than "RGB" and "RGBA" saturation, hue and grey do nothing.
            num_local: local views per image.
            crop_ratio: width over height of the crop, log-uniform.
            blur_kernel, blur_sigma: in pixels of the crop.
            backend: what follows the recipes; see ``crop_backends``.
            reduced_decode: see ``reduced_decode``.
        """
        self.image_format = image_format
        self.global_views = global_views
        self.local_view = local_view
        self.num_local = num_local
        self.crop_ratio = crop_ratio
        self.hflip_prob = hflip_prob
        self.color_jitter = color_jitter
        self.grayscale_prob = grayscale_prob
        self.blur_kernel = blur_kernel
        self.blur_sigma = blur_sigma
        self.solarize_threshold = solarize_threshold
        self.backend = checked_backend(backend)
        self.reduced_decode = reduced_decode

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        inp = cfg.INPUT

        def view(crops: CfgNode, which: int) -> ViewSettings:
            size = (crops.SIZE_PX[0], crops.SIZE_PX[-1])
            return ViewSettings(size, crops.SCALE, inp.BLUR.PROBS[which], inp.SOLARIZE.PROBS[which])

        jitter = inp.COLOR_JITTER
        return {
            "image_format": image_format(cfg),
            "global_views": [view(inp.GLOBAL_CROPS, 0), view(inp.GLOBAL_CROPS, 1)],
            "local_view": view(inp.LOCAL_CROPS, 2),
            "num_local": inp.LOCAL_CROPS.NUM,
            "crop_ratio": inp.CROP_RATIO,
            "hflip_prob": inp.HFLIP_PROB,
            "color_jitter": ColorJitterSettings(
                jitter.PROB, jitter.BRIGHTNESS, jitter.CONTRAST, jitter.SATURATION, jitter.HUE
            ),
            "grayscale_prob": inp.GRAYSCALE_PROB,
            "blur_kernel": inp.BLUR.KERNEL_SIZE_PX,
            "blur_sigma": inp.BLUR.SIGMA_PX,
            "solarize_threshold": inp.SOLARIZE.THRESHOLD,
            "backend": inp.AUGMENTATION_BACKEND,
            "reduced_decode": inp.REDUCED_DECODE,
        }

    def __call__(self, image: Any, rng: np.random.Generator) -> tuple[Sequence[Crop], Sequence[Crop]]:
        """(global crops, local crops), tensors [C, rows, columns], uint8 or, of Channels, float32 in 0..1; or pending."""
        size, factor = whole_size(image)
        image = in_format(image, self.image_format)
        recipes = self.recipes(size, rng)
        if factor > 1:
            recipes = [scaled(recipe, factor, size_of(image)) for recipe in recipes]
        crops = worker_crops(image, recipes, self.backend)
        num_global = len(self.global_views)
        return crops[:num_global], crops[num_global:]

    def reduction(self, size: tuple[int, int], rng: np.random.Generator) -> int:
        """By what an image of ``size`` may be reduced before it comes here with the same ``rng``: 1, 2, 4 or 8."""
        largest = max(self.global_views[0].size[0], self.global_views[0].size[1])
        if not self.reduced_decode or min(size) < 2 * largest:
            return 1  # most images are not large enough: draw nothing for them
        return largest_factor(self.recipes(size, rng))

    def recipes(self, size: tuple[int, int], rng: np.random.Generator) -> list[CropRecipe]:
        """What is done to an image of ``size`` (rows, columns): for the global views, then the local ones."""
        views = [*self.global_views, *[self.local_view] * self.num_local]
        return [self._recipe(size, view, rng) for view in views]

    def _recipe(self, size: tuple[int, int], view: ViewSettings, rng: np.random.Generator) -> CropRecipe:
        # Every number is drawn in the order of the operations, whatever the format and the backend.
        return CropRecipe(
            box=draw_crop_box(size, view.scale, self.crop_ratio, rng),
            size=view.size,
            flip=rng.random() < self.hflip_prob,
            jitter=self._jitter(rng) if rng.random() < self.color_jitter.prob else (),
            grey=rng.random() < self.grayscale_prob and self.image_format in COLOUR_FORMATS,
            blur=(self.blur_kernel, rng.uniform(*self.blur_sigma)) if rng.random() < view.blur_prob else None,
            solarize=self.solarize_threshold if rng.random() < view.solarize_prob else None,
        )

    def _jitter(self, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
        jitter = self.color_jitter
        is_colour = self.image_format in COLOUR_FORMATS
        brightness, contrast, saturation = (
            rng.uniform(max(0.0, 1.0 - s), 1.0 + s) for s in (jitter.brightness, jitter.contrast, jitter.saturation)
        )
        operations = [
            ("brightness", brightness, jitter.brightness > 0),
            ("contrast", contrast, jitter.contrast > 0),
            ("saturation", saturation, jitter.saturation > 0 and is_colour),
            ("hue", rng.uniform(-jitter.hue, jitter.hue), jitter.hue > 0 and is_colour),
        ]
        ordered = (operations[which] for which in rng.permutation(4))
        return tuple((name, factor) for name, factor, is_on in ordered if is_on)


class CenterCropTransform:
    """The evaluation crop: shorter side to ``resize_px`` (bicubic), then the centre.

    An image that is then still smaller than the crop is enlarged to cover it, so an 8 x 8 scan with
    ``resize_px=16, crop_size=(16, 16)`` and with ``resize_px=0`` gives the same.
    """

    def __init__(self, image_format: ImageFormat, resize_px: int, crop_size: tuple[int, int]) -> None:
        """
        Args:
            resize_px: 0 leaves the size.
            crop_size: (rows, columns).
        """
        self.image_format = image_format
        self.resize_px = resize_px
        self.crop_size = crop_size

    def __call__(self, image: Any) -> Tensor:
        """An image as a dataset loads it -> tensor [C, rows, columns], uint8 or, of Channels, float32 in 0..1."""
        from torchvision.transforms import InterpolationMode

        def crop(part: Any) -> Tensor:
            return to_tensor(self._crop(part, InterpolationMode.BICUBIC))

        return by_channels(in_format(image, self.image_format), crop)

    def mask(self, mask: np.ndarray) -> Tensor:
        """The same crop of the mask of an image, [H, W] uint8 -> [rows, columns] uint8, by nearest neighbour."""
        from PIL import Image
        from torchvision.transforms import InterpolationMode

        return to_tensor(self._crop(Image.fromarray(mask), InterpolationMode.NEAREST))[0]

    def _crop(self, image: Any, interpolation: Any) -> Any:
        from torchvision.transforms import functional as F

        rows, columns = self.crop_size
        whole = list(size_of(image))
        size = whole
        if self.resize_px:  # the longer side is cut to whole pixels, as torchvision's Resize does
            size = [int(self.resize_px * side / min(size)) for side in size]
        factor = max(rows / size[0], columns / size[1])
        if factor > 1:
            size = [max(rows, round(size[0] * factor)), max(columns, round(size[1] * factor))]
        if size != whole:
            image = F.resize(image, size, interpolation)
        return F.center_crop(image, [rows, columns])


def draw_crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop; the distribution of torchvision's RandomResizedCrop.

    Args:
        size: (rows, columns) of the image.
        scale: share of the area, uniform.
        ratio: width over height, log-uniform.
    """
    rows, columns = size
    for _ in range(_CROP_TRIES):
        area = rows * columns * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= columns and 0 < height <= rows:
            top, left = int(rng.integers(0, rows - height + 1)), int(rng.integers(0, columns - width + 1))
            return top, left, height, width
    # No fit in ten tries: the largest central crop within the range of ratios.
    if columns / rows < ratio[0]:
        width, height = columns, min(rows, round(columns / ratio[0]))
    elif columns / rows > ratio[1]:
        width, height = min(columns, round(rows * ratio[1])), rows
    else:
        width, height = columns, rows
    return (rows - height) // 2, (columns - width) // 2, height, width
