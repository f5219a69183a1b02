"""Checks of the keys that say which images come, and how they are read, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dinoengine.config.config import CfgNode
from dinoengine.config.pixels import ANY_CHANNELS, NUM_CHANNELS
from dinoengine.config.validate_evaluation import are_numbers


def check_sampling(cfg: CfgNode) -> Iterator[str]:
    """DATASETS.TRAIN_WEIGHTS, DATALOADER.SAMPLER and its file."""
    weights = cfg.DATASETS.TRAIN_WEIGHTS
    numbers = all(isinstance(w, (int, float)) and not isinstance(w, bool) and 0 < w < math.inf for w in weights)
    if weights and (len(weights) != len(cfg.DATASETS.TRAIN) or not numbers):
        yield (
            f"DATASETS.TRAIN_WEIGHTS has a positive number for each of the {len(cfg.DATASETS.TRAIN)} entries of "
            f"DATASETS.TRAIN, or is empty; got {weights}."
        )
    sampler = cfg.DATALOADER.SAMPLER
    if weights and sampler != "uniform":
        yield f"DATASETS.TRAIN_WEIGHTS {weights} and DATALOADER.SAMPLER {sampler} both say how often images come; keep one."
    if (sampler == "weighted") != bool(cfg.DATALOADER.SAMPLE_WEIGHTS):
        yield (
            "DATALOADER.SAMPLER weighted and the file DATALOADER.SAMPLE_WEIGHTS go together, got "
            f"{sampler!r} and {cfg.DATALOADER.SAMPLE_WEIGHTS!r}."
        )


def check_reduced_decode(cfg: CfgNode) -> Iterator[str]:
    """INPUT.REDUCED_DECODE and what it needs."""
    if cfg.INPUT.REDUCED_DECODE and cfg.INPUT.FORMAT == ANY_CHANNELS:
        yield f"INPUT.REDUCED_DECODE is for pictures of 8 bits, INPUT.FORMAT {ANY_CHANNELS} keeps every value; drop one."
    if cfg.INPUT.REDUCED_DECODE and cfg.INPUT.AUGMENTATION_BACKEND == "reference":
        yield "INPUT.REDUCED_DECODE needs INPUT.AUGMENTATION_BACKEND fast or device: 'reference' is the published pipeline."


def check_device_crops(cfg: CfgNode) -> Iterator[str]:
    """What INPUT.AUGMENTATION_BACKEND device does not do."""
    if cfg.INPUT.AUGMENTATION_BACKEND == "device" and cfg.INPUT.FORMAT == ANY_CHANNELS:
        yield (
            "INPUT.AUGMENTATION_BACKEND device makes crops of 8 bits (INPUT.FORMAT RGB, L or RGBA), and FORMAT "
            f"{ANY_CHANNELS} keeps every value; use the backend fast, or reference."
        )


def check_value_range(image_format: str, values: Any) -> Iterator[str]:
    """INPUT.FORMAT and INPUT.VALUE_RANGE."""
    is_range = are_numbers(values, 2) and values[0] < values[1]
    if image_format == ANY_CHANNELS and not is_range:
        yield (
            f"INPUT.FORMAT {ANY_CHANNELS} needs INPUT.VALUE_RANGE (low, high): the stored values that become 0 and 1, e.g. "
            f"(0, 65535) for 16 bits, (0, 4095) for 12, (0, 255) for 8; got {values}."
        )
    if image_format in NUM_CHANNELS and tuple(values):
        yield (
            f"INPUT.VALUE_RANGE {values} is for INPUT.FORMAT {ANY_CHANNELS}; {image_format} has 8 bits, and 0..255 become "
            "0..1. For 16 bits or floats set FORMAT channels, with a MODEL.PIXEL_MEAN and PIXEL_STD for each channel."
        )
