"""The keys that say what numbers a model sees for a pixel, and the values that are assumed where nothing says them."""

from __future__ import annotations

from typing import Any

# A model is of use with the values of its training alone: they are kept in its checkpoints and compared.
PIXEL_KEYS = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "INPUT.VALUE_RANGE")

# Channels of each INPUT.FORMAT that Pillow has; "channels" has as many as MODEL.PIXEL_MEAN.
NUM_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
ANY_CHANNELS = "channels"


def assumed_format(num_channels: int) -> dict[str, Any]:
    """INPUT.FORMAT and INPUT.VALUE_RANGE for weights that say nothing but their number of channels: 8 bits each."""
    pillow = {1: "L", 3: "RGB"}.get(num_channels)
    return {"INPUT.FORMAT": pillow or ANY_CHANNELS, "INPUT.VALUE_RANGE": () if pillow else (0, 255)}
