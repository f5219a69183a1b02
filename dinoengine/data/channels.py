"""INPUT.FORMAT: what an image of any kind becomes before crops are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.config.pixels import ANY_CHANNELS
from dinoengine.data.array_images import picture_array, require_image
from dinoengine.data.decode import to_format

# Formats in which saturation, hue and grey have a meaning.
COLOUR_FORMATS = ("RGB", "RGBA")


@dataclass(frozen=True)
class Channels:
    """All channels of an image with all their bits: INPUT.FORMAT "channels".

    Attributes:
        count: of the channels.
        value_range: stored values that become 0 and 1.
    """

    count: int
    value_range: tuple[float, float]


# A mode of Pillow ("RGB", "L", "RGBA"), or Channels.
ImageFormat = str | Channels


def image_format(cfg: CfgNode) -> ImageFormat:
    """What INPUT.FORMAT asks for."""
    if cfg.INPUT.FORMAT != ANY_CHANNELS:
        return str(cfg.INPUT.FORMAT)
    return Channels(len(cfg.MODEL.PIXEL_MEAN), cfg.INPUT.VALUE_RANGE)


def num_array_channels(wanted: ImageFormat) -> int:
    """What ``ImageDataset.read_channels`` is told: 0 for the formats of Pillow."""
    return wanted.count if isinstance(wanted, Channels) else 0


def in_format(image: Any, wanted: ImageFormat) -> Any:
    """An image as crops are made of it.

    Args:
        image: a ``PIL.Image``, or an array [H, W] or [H, W, C].

    Returns:
        For a mode of Pillow a ``PIL.Image`` in it; for Channels a float32 tensor [C, H, W] in 0..1 of its own memory:
        (stored - low) / (high - low), cut to 0..1. float32 holds every whole number up to 2**24, so 16 bits stay distinct.

    Raises:
        ValueError: for an image that cannot become that: a float for a mode of Pillow, another number of channels.
    """
    if not isinstance(wanted, Channels):
        if isinstance(image, np.ndarray):
            raise ValueError(
                f"An array of shape {image.shape} needs INPUT.FORMAT channels; {wanted} is for pictures that Pillow reads."
            )
        return to_format(image, wanted)
    array = require_image(image if isinstance(image, np.ndarray) else picture_array(image), wanted.count)
    low, high = wanted.value_range
    values = array.transpose(2, 0, 1).astype(np.float32, order="C")
    values -= low
    values /= high - low
    return torch.from_numpy(values.clip(0, 1, out=values))


def size_of(image: Any) -> tuple[int, int]:
    """(rows, columns) of a ``PIL.Image`` or a tensor [C, H, W]."""
    return (image.shape[1], image.shape[2]) if isinstance(image, Tensor) else (image.height, image.width)
