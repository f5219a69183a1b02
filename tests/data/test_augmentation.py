from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dinoengine.config import get_cfg
from dinoengine.data import AUGMENTATION_REGISTRY, MultiCrop
from dinoengine.data.augmentation import ColorJitterSettings, ViewSettings, draw_crop_box
from dinoengine.data.random_streams import CROPS, position_rng

JITTER = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
OPERATIONS = ("resized_crop", "hflip", *JITTER, "rgb_to_grayscale", "gaussian_blur", "solarize")


def _photo(rows: int, columns: int, mode: str = "RGB") -> Image.Image:
    shape = (rows, columns, 3) if mode == "RGB" else (rows, columns)
    return Image.fromarray(np.random.default_rng(rows * 1000 + columns).integers(0, 256, shape, dtype=np.uint8))


def _all_crops(augmentation: MultiCrop, image: Image.Image, position: int) -> list[torch.Tensor]:
    global_crops, local_crops = augmentation(image, _rng(position))
    return global_crops + local_crops


def _rng(position: int) -> np.random.Generator:
    return position_rng(0, position, CROPS)


def _published(*overrides: str) -> MultiCrop:
    """The default augmentation with small crops."""
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.GLOBAL_CROPS.SIZE_PX=16", "INPUT.LOCAL_CROPS.SIZE_PX=8", *overrides])
    return MultiCrop(cfg)


def _one_operation(**settings: Any) -> MultiCrop:
    """Crops that are the whole image at its size, and nothing else unless ``settings`` say so."""
    blur, solarize = settings.pop("blur_prob", 0.0), settings.pop("solarize_prob", 0.0)
    view = ViewSettings(settings.pop("size", (24, 24)), (1.0, 1.0), blur, solarize)
    defaults: dict[str, Any] = {
        "image_format": "RGB",
        "global_views": [view],
        "local_view": view,
        "num_local": 0,
        "crop_ratio": (1.0, 1.0),
        "hflip_prob": 0.0,
        "color_jitter": ColorJitterSettings(0.0, 0.0, 0.0, 0.0, 0.0),
        "grayscale_prob": 0.0,
        "blur_kernel": 9,
        "blur_sigma": (0.1, 2.0),
        "solarize_threshold": 128,
    }
    return MultiCrop(**{**defaults, **settings})


class Record(list):
    """(name, parameters) of every torchvision operation, in order; a view begins with resized_crop."""

    def views(self) -> list[dict[str, tuple]]:
        views: list[dict[str, tuple]] = []
        for name, parameters in self:
            if name == "resized_crop":
                views.append({})
            assert name not in views[-1], f"{name} twice in one view"
            views[-1][name] = parameters
        return views


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    calls = Record()

    def spy(name: str, original: Any) -> Any:
        def wrapped(image: Image.Image, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, (*args, *kwargs.values())))
            return original(image, *args, **kwargs)

        return wrapped

    for name in OPERATIONS:
        monkeypatch.setattr(F, name, spy(name, getattr(F, name)))
    return calls


def _ks(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples, in units of its scale (1.95: a chance of 0.1 %)."""
    points = np.sort(np.concatenate([a, b]))
    cdf_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return abs(cdf_a - cdf_b).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


def _ks_uniform(values: list[float], low: float, high: float) -> float:
    assert low <= min(values)
    assert max(values) <= high
    return _ks(np.array(values), np.linspace(low, high, 20 * len(values)))


# ---- the whole


def test_the_default_crops():
    assert AUGMENTATION_REGISTRY.get("MultiCrop") is MultiCrop
    global_crops, local_crops = MultiCrop(get_cfg())(_photo(60, 80), _rng(0))
    assert [tuple(c.shape) for c in global_crops] == [(3, 224, 224)] * 2
    assert [tuple(c.shape) for c in local_crops] == [(3, 96, 96)] * 8
    assert {c.dtype for c in global_crops + local_crops} == {torch.uint8}
    assert all(c.is_contiguous() for c in global_crops + local_crops)


def test_rows_come_before_columns_and_no_local_crops_are_an_empty_list():
    augmentation = _published("INPUT.GLOBAL_CROPS.SIZE_PX=(16, 32)", "INPUT.LOCAL_CROPS.NUM=0")
    global_crops, local_crops = augmentation(_photo(40, 30), _rng(0))
    assert [tuple(c.shape) for c in global_crops] == [(3, 16, 32)] * 2
    assert local_crops == []
    local = _published("INPUT.LOCAL_CROPS.SIZE_PX=(12, 8)", "INPUT.LOCAL_CROPS.NUM=3")(_photo(40, 30), _rng(0))[1]
    assert [tuple(c.shape) for c in local] == [(3, 12, 8)] * 3


def test_crops_are_a_function_of_image_and_generator():
    augmentation, image = _published(), _photo(40, 50)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first = _all_crops(augmentation, image, 5)
    random.random()
    torch.rand(3)
    again = _all_crops(pickle.loads(pickle.dumps(augmentation)), image, 5)
    other = _all_crops(augmentation, image, 6)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    random.setstate(states[0])
    torch.set_rng_state(torch.tensor(states[2], dtype=torch.uint8))
    augmentation(image, _rng(5))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_the_image_itself_is_not_changed_and_no_memory_is_shared():
    image = _photo(16, 16)
    before = np.array(image)
    crops = _one_operation(size=(16, 16))(image, _rng(0))[0]
    crops[0].zero_()
    assert np.array_equal(np.asarray(image), before)


# ---- operation by operation


def test_every_view_is_the_published_chain_of_torchvision_operations(record: Record):
    """Replays what was recorded with torchvision alone: the same pixels, and nothing happens beside it."""
    augmentation, image = _published(), _photo(40, 50)
    for position in range(12):
        record.clear()
        crops = _all_crops(augmentation, image, position)
        views = record.views()
        assert len(views) == len(crops) == 10
        calls = list(record)
        replayed = []
        for name, parameters in calls:
            current = image if name == "resized_crop" else replayed.pop()
            replayed.append(getattr(F, name)(current, *parameters))
        for crop, expected in zip(crops, replayed, strict=True):
            assert torch.equal(crop, T.PILToTensor()(expected))
        for view in views:
            assert view["resized_crop"][-1] is InterpolationMode.BICUBIC
            rank = {name: 2 if name in JITTER else i for i, name in enumerate(OPERATIONS)}
            ranks = [rank[name] for name in view]
            assert ranks == sorted(ranks), list(view)
            assert len(set(JITTER) & set(view)) in (0, 4)


def test_each_operation_happens_as_often_as_the_config_says(record: Record):
    augmentation, image = _published("INPUT.LOCAL_CROPS.NUM=2"), _photo(12, 12)
    runs = 400
    for position in range(runs):
        augmentation(image, _rng(position))
    views = record.views()
    kinds = {"global 1": views[0::4], "global 2": views[1::4], "local": views[2::4] + views[3::4]}
    expected = {"hflip": 0.5, "adjust_hue": 0.8, "rgb_to_grayscale": 0.2}
    blur = {"global 1": 0.0, "global 2": 0.9, "local": 0.5}
    solarize = {"global 1": 0.0, "global 2": 0.2, "local": 0.0}
    for kind, members in kinds.items():
        for name, p in {**expected, "gaussian_blur": blur[kind], "solarize": solarize[kind]}.items():
            rate = np.mean([name in view for view in members])
            error = math.sqrt(p * (1 - p) / len(members))
            assert abs(rate - p) <= 4.5 * error, (kind, name, rate)
    assert {view["rgb_to_grayscale"] for view in views if "rgb_to_grayscale" in view} == {(3,)}
    assert {view["solarize"] for view in views if "solarize" in view} == {(128,)}
    blurs = [view["gaussian_blur"] for view in views if "gaussian_blur" in view]
    assert all(kernel == [9, 9] and x == y for kernel, (x, y) in blurs)
    assert _ks_uniform([sigma[0] for _, sigma in blurs], 0.1, 2.0) < 1.95
    # Independent of each other: flips do not come with blurs.
    locals_ = kinds["local"]
    pairs = np.array([["hflip" in v, "gaussian_blur" in v, "adjust_hue" in v] for v in locals_], dtype=float)
    assert abs(np.corrcoef(pairs, rowvar=False) - np.eye(3)).max() < 4.5 / math.sqrt(len(locals_))


def test_colour_jitter_draws_as_torchvision_does(record: Record):
    jitter = ColorJitterSettings(1.0, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    augmentation, image = _one_operation(size=(2, 2), color_jitter=jitter), _photo(2, 2)
    for position in range(1200):
        augmentation(image, _rng(position))
    views = record.views()
    limits = T.ColorJitter(0.4, 1.5, 0.2, 0.1)
    for name in JITTER:
        low, high = getattr(limits, name.removeprefix("adjust_"))
        assert _ks_uniform([view[name][0] for view in views], low, high) < 1.95, name
    orders = Counter(tuple(name for name in view if name in JITTER) for view in views)
    assert len(orders) == 24
    assert sum((n - 50) ** 2 / 50 for n in orders.values()) < 23 + 5 * math.sqrt(2 * 23)


def test_a_strength_of_zero_leaves_the_operation_out(record: Record):
    jitter = ColorJitterSettings(1.0, brightness=0.0, contrast=0.3, saturation=0.0, hue=0.0)
    _one_operation(color_jitter=jitter)(_photo(24, 24), _rng(0))
    assert [name for name, _ in record] == ["resized_crop", "adjust_contrast"]


@pytest.mark.parametrize(
    "settings, transform",
    [
        ({}, T.Compose([])),
        ({"size": (11, 30)}, T.Resize((11, 30), InterpolationMode.BICUBIC)),
        ({"hflip_prob": 1.0}, T.RandomHorizontalFlip(p=1.0)),
        ({"grayscale_prob": 1.0}, T.RandomGrayscale(p=1.0)),
        ({"blur_prob": 1.0, "blur_sigma": (1.3, 1.3)}, T.GaussianBlur(9, (1.3, 1.3))),
        ({"blur_prob": 1.0, "blur_sigma": (0.7, 0.7), "blur_kernel": 5}, T.GaussianBlur(5, (0.7, 0.7))),
        ({"solarize_prob": 1.0}, T.RandomSolarize(128, p=1.0)),
        ({"solarize_prob": 1.0, "solarize_threshold": 40}, T.RandomSolarize(40, p=1.0)),
        (
            {
                "solarize_prob": 1.0,
                "hflip_prob": 1.0,
                "grayscale_prob": 1.0,
                "blur_prob": 1.0,
                "blur_sigma": (1.0, 1.0),
            },
            T.Compose(
                [
                    T.RandomHorizontalFlip(p=1.0),
                    T.RandomGrayscale(p=1.0),
                    T.GaussianBlur(9, (1.0, 1.0)),
                    T.RandomSolarize(128, p=1.0),
                ]
            ),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_operation_that_is_certain_equals_the_class_of_torchvision(settings: dict[str, Any], transform: Any):
    image = _photo(24, 24)
    crop = _one_operation(**settings)(image, _rng(0))[0][0]
    assert torch.equal(crop, T.PILToTensor()(transform(image)))


def test_grey_images_have_one_channel_and_no_colour_operations(record: Record):
    augmentation = _published("INPUT.FORMAT=L", "INPUT.COLOR_JITTER.PROB=1.0", "INPUT.GRAYSCALE_PROB=1.0")
    for image in (_photo(30, 30, "L"), _photo(30, 30)):
        crops = _all_crops(augmentation, image, 1)
        assert {c.shape[0] for c in crops} == {1}
    names = {name for name, _ in record}
    assert {"adjust_brightness", "adjust_contrast", "gaussian_blur"} <= names
    assert not names & {"adjust_saturation", "adjust_hue", "rgb_to_grayscale"}


def test_grey_crops_of_a_grey_image_are_those_of_the_same_image_in_colour():
    """Without colour operations both formats draw the same numbers and see the same picture."""
    overrides = ["INPUT.COLOR_JITTER.PROB=0.0", "INPUT.GRAYSCALE_PROB=0.0"]
    grey = _photo(30, 40, "L")
    in_grey = _all_crops(_published("INPUT.FORMAT=L", *overrides), grey, 2)
    in_colour = _all_crops(_published(*overrides), grey, 2)
    assert all(torch.equal(g.expand_as(c), c) for g, c in zip(in_grey, in_colour, strict=True))


def test_a_scan_of_8_by_8_pixels_can_be_cropped():
    augmentation = _published("INPUT.FORMAT=L")
    for position in range(30):
        global_crops, local_crops = augmentation(_photo(8, 8, "L"), _rng(position))
        assert {tuple(c.shape) for c in global_crops} == {(1, 16, 16)}
        assert {tuple(c.shape) for c in local_crops} == {(1, 8, 8)}


# ---- the crop box


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)], ids=["global", "local"])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (100, 260)], ids=str)
def test_crop_boxes_are_distributed_as_those_of_torchvision(size: tuple[int, int], scale: tuple[float, float]):
    ratio, count, rng = (3 / 4, 4 / 3), 1500, np.random.default_rng(0)
    image = Image.new("L", (size[1], size[0]))
    ours = np.array([draw_crop_box(size, scale, ratio, rng) for _ in range(count)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = T.RandomResizedCrop(8, scale, ratio)
        theirs = np.array([crop.get_params(image, list(scale), list(ratio)) for _ in range(count)])

    def statistics(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, height, width = boxes.T
        return {
            "area": height * width,
            "ratio": np.log(width / height),
            "top": top / np.maximum(1, size[0] - height),
            "left": left / np.maximum(1, size[1] - width),
            "height": height,
        }

    found, expected = statistics(ours), statistics(theirs)
    for name in found:
        assert _ks(found[name], expected[name]) < 1.95, name


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (9, 1000), (1001, 12), (1, 400), (400, 1)], ids=str)
def test_when_no_box_fits_it_is_the_central_one_of_torchvision(size: tuple[int, int]):
    image = Image.new("L", (size[1], size[0]))
    ratio = (3 / 4, 4 / 3)
    expected = T.RandomResizedCrop.get_params(image, [0.32, 1.0], list(ratio))
    assert draw_crop_box(size, (0.32, 1.0), ratio, np.random.default_rng(0)) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 2), (8, 8), (2, 50)], ids=str)
@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.0, 1.0), (1.0, 1.0)], ids=str)
def test_a_box_always_lies_in_the_image(size: tuple[int, int], scale: tuple[float, float]):
    rng = np.random.default_rng(0)
    for _ in range(100):
        top, left, height, width = draw_crop_box(size, scale, (3 / 4, 4 / 3), rng)
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        assert height > 0
        assert width > 0
