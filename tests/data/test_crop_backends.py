"""INPUT.AUGMENTATION_BACKEND: the same crops whichever makes them."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision import transforms as T

from dinoengine.config import CfgNode, get_cfg, validate
from dinoengine.config.resume_rules import DEFINED, rule_of
from dinoengine.data import MultiCrop, SingleCrop, build_train_loader
from dinoengine.data.crop_backends import BACKENDS, checked_backend
from dinoengine.data.decoded_batch import made_crops
from dinoengine.data.fast_crops import opencv
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.evaluation.linear import _training_cfg
from dinoengine.evaluation.linear_settings import LinearSettings


def _cfg(backend: str, *overrides: Any) -> CfgNode:
    if backend == "fast":
        pytest.importorskip("cv2")
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.AUGMENTATION_BACKEND", backend, *overrides])
    return cfg


SMALL = ("INPUT.GLOBAL_CROPS.SIZE_PX", (64,), "INPUT.LOCAL_CROPS.SIZE_PX", (32,))


def _crops(image: Any, position: int, backend: str, *overrides: Any) -> list[Tensor]:
    global_crops, local_crops = MultiCrop(_cfg(backend, *overrides))(image, position_rng(0, position, CROPS))
    return made_crops([*global_crops, *local_crops])


OTHERS = [name for name in BACKENDS if name != "reference"]


def _mean_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.int() - b.int()).abs().float().mean().item()


def _photograph() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg"))


# ---- the same crops


def test_the_default_is_the_published_pipeline():
    assert get_cfg().INPUT.AUGMENTATION_BACKEND == "reference"


@pytest.mark.parametrize("backend", OTHERS)
def test_the_crops_of_a_photograph_differ_by_rounding_alone(backend: str):
    """Crop by crop, on the default config: below 1 level on average, 4 in the worst (a level at the solarize threshold is
    inverted on one side only); another position differs by tens."""
    image, differences, others = _photograph(), [], []
    for position in range(4):
        reference, other = (_crops(image, position, which) for which in ("reference", backend))
        differences += [_mean_difference(a, b) for a, b in zip(reference, other, strict=True)]
        others += [_mean_difference(a, b) for a, b in zip(reference, _crops(image, position + 1, backend), strict=True)]
    assert np.mean(differences) < 1
    assert max(differences) < 4
    assert np.mean(others) > 20


@pytest.mark.parametrize("overrides", [(), ("INPUT.FORMAT", "L")], ids=["RGB", "L"])
def test_a_recipe_does_not_know_the_backend(overrides: tuple[Any, ...]):
    augmentations = [MultiCrop(_cfg(backend, *overrides)) for backend in BACKENDS]
    for position in range(20):
        rngs = [position_rng(3, position, CROPS) for _ in BACKENDS]
        first, *rest = (each.recipes((375, 500), rng) for each, rng in zip(augmentations, rngs, strict=True))
        assert all(recipes == first for recipes in rest)
        assert len({rng.random() for rng in rngs}) == 1


MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I")


@pytest.mark.parametrize("image_format", ["RGB", "L"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", OTHERS)
def test_images_of_every_mode(backend: str, mode: str, image_format: str):
    if mode in ("I;16", "I"):
        values = np.asarray(_photograph().convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    else:
        image = _photograph().convert("RGBA").convert(mode) if mode == "LA" else _photograph().convert(mode)
    assert image.mode == mode
    reference, other = (
        _crops(image, 1, which, *SMALL, "INPUT.FORMAT", image_format) for which in ("reference", backend)
    )
    assert {crop.shape[0] for crop in other} == {3 if image_format == "RGB" else 1}
    assert np.mean([_mean_difference(a, b) for a, b in zip(reference, other, strict=True)]) < 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 50), (50, 3), (8, 8), (31, 33), (64, 64)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("backend", OTHERS)
def test_images_smaller_than_the_crop(backend: str, size: tuple[int, int], mode: str):
    image = _photograph().convert(mode).resize(size)
    for position in range(3):
        reference, other = (
            _crops(image, position, which, *SMALL, "INPUT.FORMAT", mode) for which in ("reference", backend)
        )
        assert [tuple(crop.shape[1:]) for crop in other] == [(64, 64)] * 2 + [(32, 32)] * 8
        assert np.mean([_mean_difference(a, b) for a, b in zip(reference, other, strict=True)]) < 1.5


@pytest.mark.parametrize("backend", OTHERS)
def test_single_crops(backend: str):
    overrides = ("INPUT.GLOBAL_CROPS.SIZE_PX", (64,))
    for position in range(8):
        reference, other = (
            made_crops(SingleCrop(_cfg(which, *overrides))(_photograph(), position_rng(0, position, CROPS))[0])
            for which in ("reference", backend)
        )
        assert _mean_difference(reference[0], other[0]) < 0.3


# ---- the distribution, read from the pixels of the crops


def _ks(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples, in units of its scale (1.95: a chance of 0.1 %)."""
    points = np.sort(np.concatenate([a, b]))
    cdf_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return abs(cdf_a - cdf_b).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


def test_position_scale_and_ratio_of_the_crops_are_those_of_torchvision():
    """Red is the column and green the row of a pixel: a crop shows where it lies."""
    off = ["INPUT.COLOR_JITTER.PROB", 0.0, "INPUT.GRAYSCALE_PROB", 0.0, "INPUT.BLUR.PROBS", (0.0,) * 3]
    off += ["INPUT.SOLARIZE.PROBS", (0.0,) * 3, "INPUT.LOCAL_CROPS.NUM", 4, *SMALL]
    rows, columns, scale, ratio = 192, 256, (0.05, 0.32), (3 / 4, 4 / 3)
    y, x = np.mgrid[0:rows, 0:columns]
    image = Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8))
    augmentation = MultiCrop(_cfg("fast", *off))
    ours, flipped = [], []
    for position in range(300):
        for crop in augmentation(image, position_rng(0, position, CROPS))[1]:
            # Means of halves are a half width apart, whatever is rounded at the edges.
            halves = [half.double().mean().item() for half in (*crop[0].chunk(2, dim=1), *crop[1].chunk(2, dim=0))]
            width, height = 2 * abs(halves[1] - halves[0]), 2 * abs(halves[3] - halves[2])
            flipped.append(halves[1] < halves[0])
            ours.append((width, height, sum(halves[:2]) / 2 + 0.5, sum(halves[2:]) / 2 + 0.5))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = Image.new("L", (columns, rows))
        boxes = [T.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(1200)]
    theirs = [(w, h, left + w / 2, top + h / 2) for top, left, h, w in boxes]
    for which, (found, expected) in enumerate(zip(np.array(ours).T, np.array(theirs).T, strict=True)):
        assert _ks(found, expected) < 1.95, which
    (width, height), (their_width, their_height) = np.array(ours).T[:2], np.array(theirs).T[:2]
    assert _ks(width * height, their_width * their_height) < 1.95
    assert _ks(np.log(width / height), np.log(their_width / their_height)) < 1.95
    assert abs(np.mean(flipped) - 0.5) < 4.5 * 0.5 / math.sqrt(len(flipped))


# ---- whoever makes them


def test_crops_belong_to_positions_whatever_worker_makes_them(tmp_path: Path):
    for i in range(6):
        _photograph().rotate(30 * i).resize((90, 70)).save(tmp_path / f"{i}.jpg")
    overrides = ["DATASETS.TRAIN", (f"folder:{tmp_path}",), "SOLVER.IMS_PER_BATCH", 4, "SEED", 3, *SMALL]
    overrides += ["MODEL.LOSS.IBOT_WEIGHT", 0.0]

    def batches(num_workers: int, start_iter: int, count: int) -> list[Any]:
        loader = iter(build_train_loader(_cfg("fast", *overrides, "DATALOADER.NUM_WORKERS", num_workers), start_iter))
        return [next(loader) for _ in range(count)]

    expected = batches(0, 0, 3)
    for found in (batches(2, 0, 3), [None, *batches(1, 1, 2)]):
        for one, other in zip(expected, found, strict=True):
            if other is not None:
                assert torch.equal(one.global_crops, other.global_crops)
                assert torch.equal(one.local_crops, other.local_crops)


def test_an_augmentation_can_be_sent_to_a_worker():
    augmentation = MultiCrop(_cfg("fast", *SMALL))
    again = pickle.loads(pickle.dumps(augmentation))
    for a, b in zip(
        *(each(_photograph(), position_rng(0, 2, CROPS))[1] for each in (augmentation, again)), strict=True
    ):
        assert torch.equal(a, b)


# ---- config


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="must be one of reference, fast, device; got 'turbo'"):
        checked_backend("turbo")
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION_BACKEND = "fats"
    with pytest.raises(ValueError, match="INPUT.AUGMENTATION_BACKEND must be one of .*'fats' .did you mean 'fast'"):
        validate(cfg, world_size=1)


def test_without_opencv_it_is_said_before_training_what_to_install(monkeypatch: pytest.MonkeyPatch):
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION_BACKEND = "fast"
    opencv.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    try:
        for augmentation in (MultiCrop, SingleCrop):
            with pytest.raises(
                ModuleNotFoundError, match=r"'fast' needs OpenCV.*dinoengine\[fast\].*or set 'reference'"
            ):
                augmentation(cfg)
        cfg.INPUT.AUGMENTATION_BACKEND = "reference"
        MultiCrop(cfg)
    finally:
        opencv.cache_clear()


@pytest.mark.parametrize("backend", OTHERS)
def test_a_resumed_run_may_change_it_and_a_probe_does_not(backend: str):
    assert rule_of("INPUT.AUGMENTATION_BACKEND").kind == DEFINED
    cfg = _cfg(backend)
    own = _training_cfg(cfg, LinearSettings.from_config(cfg, 100), ("digits",), 10)
    assert own.INPUT.AUGMENTATION_BACKEND == "reference"
