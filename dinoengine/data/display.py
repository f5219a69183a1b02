"""Images of any number of channels as colours that can be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinoengine.data.channels import Channels, ImageFormat
from dinoengine.structures import IGNORE

# Of channels that are no colours; more channels than these take them again from the first.
_CHANNEL_COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
}
# Black and white of a channel are these shares of its values: a few extreme pixels do not make the rest invisible.
_DARKEST, _BRIGHTEST = 0.005, 0.995
_MAX_VALUES = 1_000_000
_CHECKER_PX, _CHECKER_GREYS = 8, (0.8, 0.6)
_MASKED = np.array([38, 42, 58], dtype=np.uint8)


class Display:
    """How the pixels of a format are shown.

    "RGB" and "L" as they are, "RGBA" on a checkerboard. Of ``Channels`` one is grey; several have a colour each and are
    added up. Their values are stretched, the same for all images of a sheet.
    """

    def __init__(self, image_format: ImageFormat, images: Sequence[Tensor]) -> None:
        """
        Args:
            images: [C, H, W] float in 0..1, of which Channels get the limits between which they are stretched.
        """
        self.image_format = image_format
        self.limits: list[tuple[float, float]] = []
        if isinstance(image_format, Channels):
            self.limits = [
                _limits(torch.cat([image[c].flatten() for image in images])) for c in range(image_format.count)
            ]

    def pixels(self, image: Tensor) -> np.ndarray:
        """[C, H, W] float in 0..1 -> [H, W, 3] uint8."""
        image = image.clamp(0, 1)
        if isinstance(self.image_format, Channels):
            planes = torch.stack([self._stretched(image, channel) for channel in range(len(image))])
            return _bytes(planes.expand(3, -1, -1) if len(planes) == 1 else _added_up(planes))
        if len(image) == 4:
            image = image[3] * image[:3] + (1 - image[3]) * _checkerboard(image.shape[1], image.shape[2])
        return _bytes(image.expand(3, -1, -1))

    def channel(self, image: Tensor, channel: int) -> np.ndarray:
        """One channel of an image as grey, stretched like ``pixels``, [H, W, 3] uint8."""
        return _bytes(self._stretched(image.clamp(0, 1), channel).expand(3, -1, -1))

    def describe(self) -> str:
        """How channels are shown, for a note on the sheet; empty where pixels are shown as they are."""
        if self.image_format == "RGBA":
            return "Transparent pixels are shown on a checkerboard; the model sees their colours and the alpha."
        if not self.limits:
            return ""
        names = ["grey"] if len(self.limits) == 1 else [_colour_name(i) for i in range(len(self.limits))]
        parts = (
            f"{i} {name} ({low:.4f} to {high:.4f})"
            for i, (name, (low, high)) in enumerate(zip(names, self.limits, strict=True))
        )
        return f"Channels are shown stretched from black to full colour: {', '.join(parts)} of INPUT.VALUE_RANGE."

    def _stretched(self, image: Tensor, channel: int) -> Tensor:
        low, high = self.limits[channel]
        return ((image[channel] - low) / (high - low)).clamp(0, 1)


def with_masked_patches(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture whose masked patches are covered.

    Args:
        pixels: [H, W, 3] uint8.
        mask: [rows, columns] bool, of the patch grid.
    """
    rows, columns = (side // patches for side, patches in zip(pixels.shape, mask.shape, strict=False))
    covered = np.repeat(np.repeat(mask, rows, axis=0), columns, axis=1)
    return np.where(covered[..., None], _MASKED, pixels)


def class_colours(classes: np.ndarray) -> np.ndarray:
    """[H, W] class of each pixel -> [H, W, 3] uint8, a colour for each class, black where there is none."""
    # Steps of the golden ratio around the circle of hues keep neighbouring classes apart, however many there are.
    hues = np.arange(256) * 0.618034 % 1
    thirds = np.abs((hues[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    table = (255 * (0.25 + 0.75 * thirds.clip(0, 1))).astype(np.uint8)
    table[IGNORE] = 0
    return table[classes]


def _limits(values: Tensor) -> tuple[float, float]:
    values = values[:: max(1, len(values) // _MAX_VALUES)]
    low, high = (float(v) for v in torch.quantile(values, torch.tensor([_DARKEST, _BRIGHTEST])))
    return (low, high) if high > low else (0.0, 1.0)


def _colour_name(channel: int) -> str:
    return list(_CHANNEL_COLOURS)[channel % len(_CHANNEL_COLOURS)]


def _added_up(planes: Tensor) -> Tensor:
    colours = torch.tensor([_CHANNEL_COLOURS[_colour_name(i)] for i in range(len(planes))], dtype=torch.float32)
    return torch.einsum("chw,ck->khw", planes, colours).clamp(0, 1)


def _checkerboard(rows: int, columns: int) -> Tensor:
    odd = (torch.arange(rows)[:, None] // _CHECKER_PX + torch.arange(columns) // _CHECKER_PX) % 2
    return torch.tensor(_CHECKER_GREYS)[odd]


def _bytes(image: Tensor) -> np.ndarray:
    pixels: np.ndarray = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)
