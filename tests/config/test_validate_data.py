"""What config/validate_data.py finds, and what it lets pass."""

from __future__ import annotations

from typing import Any

import pytest

from dinoengine.config import get_cfg
from dinoengine.config.validate_data import check_device_crops, check_reduced_decode, check_sampling


def _problems(*overrides: Any) -> list[str]:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", ("digits",), *overrides])
    return [*check_sampling(cfg), *check_reduced_decode(cfg), *check_device_crops(cfg)]


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, "a"), (1, float("nan")), (1, 2, 3)])
def test_weights_of_a_mixture_are_positive_and_one_per_entry(weights: tuple[Any, ...]) -> None:
    problems = _problems("DATASETS.TRAIN", ("digits", "synthetic"), "DATASETS.TRAIN_WEIGHTS", weights)
    assert any("TRAIN_WEIGHTS has a positive number for each of the 2 entries" in problem for problem in problems)
    assert _problems("DATASETS.TRAIN", ("digits", "synthetic"), "DATASETS.TRAIN_WEIGHTS", (1, 0.5)) == []


def test_reduced_decoding_is_none_of_the_published_pipeline() -> None:
    (problem,) = _problems("INPUT.REDUCED_DECODE", True)
    assert "needs INPUT.AUGMENTATION_BACKEND fast or device" in problem
    for backend in ("fast", "device"):
        assert _problems("INPUT.REDUCED_DECODE", True, "INPUT.AUGMENTATION_BACKEND", backend) == []
    (problem,) = _problems(
        *("INPUT.REDUCED_DECODE", True, "INPUT.AUGMENTATION_BACKEND", "fast", "INPUT.FORMAT", "channels")
    )
    assert "keeps every value" in problem


def test_the_device_makes_crops_of_8_bits() -> None:
    device = ("INPUT.AUGMENTATION_BACKEND", "device")
    for image_format in ("RGB", "L", "RGBA"):
        assert _problems(*device, "INPUT.FORMAT", image_format) == []
    (problem,) = _problems(*device, "INPUT.FORMAT", "channels")
    assert "device makes crops of 8 bits" in problem
    assert "use the backend fast, or reference" in problem


def test_one_key_says_how_often_images_come() -> None:
    mixed = ("DATASETS.TRAIN", ("digits", "synthetic"), "DATASETS.TRAIN_WEIGHTS", (1, 2))
    (problem,) = _problems(*mixed, "DATALOADER.SAMPLER", "class_balanced")
    assert "both say how often images come" in problem
    (problem,) = _problems("DATALOADER.SAMPLER", "weighted")
    assert "DATALOADER.SAMPLE_WEIGHTS go together, got 'weighted' and ''" in problem
    (problem,) = _problems("DATALOADER.SAMPLE_WEIGHTS", "w.npy")
    assert "go together, got 'uniform' and 'w.npy'" in problem
    assert _problems("DATALOADER.SAMPLER", "weighted", "DATALOADER.SAMPLE_WEIGHTS", "w.npy") == []
