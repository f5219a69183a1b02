"""Flip, colour, blur and solarize of many crops at once, on any device, each as Pillow and torchvision compute it.

Pillow works on whole levels: what it rounds or cuts off after an operation is so here, in numbers that hold it exactly. So
all but the blur equal it to the bit (tests/data/test_batched_colour.py). No value depends on another crop of the batch, and
nothing waits for the device.

Shapes: n crops, C channels (1, or 3 colours; flip and blur take any number), H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operation = Callable[[Tensor, Tensor], Tensor]


def flip(crops: Tensor, _: Tensor) -> Tensor:
    """[n, C, H, W], mirrored."""
    return crops.flip(-1)


def brightness(crops: Tensor, factors: Tensor) -> Tensor:
    """[n, C, H, W] uint8 and [n, 1] factors as torchvision's ``adjust_brightness`` takes them -> the same shape."""
    return _blend(torch.zeros((), device=crops.device), crops, factors)


def contrast(crops: Tensor, factors: Tensor) -> Tensor:
    """As ``brightness``; away from or towards the mean of the grey crop, which Pillow rounds."""
    sums = _grey(crops).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend((sums.double() / crops[0, 0].numel() + 0.5).floor().float(), crops, factors)


def saturation(crops: Tensor, factors: Tensor) -> Tensor:
    """As ``brightness``; away from or towards the grey crop."""
    return _blend(_grey(crops).float(), crops, factors)


def hue(crops: Tensor, steps: Tensor) -> Tensor:
    """[n, 3, H, W] uint8 turned by [n, 1] whole steps of a circle that has 256, through HSV of 8 bits as in Pillow."""
    # Pillow's steps in single and double precision are followed: whole results are cut off, and which side of a whole
    # number a value lies on is a matter of the last bit.
    red, green, blue = crops.float().unbind(1)
    value, least = crops.amax(1), crops.amin(1)
    spread = (value.float() - least).clamp(min=1)
    from_red, from_green, from_blue = ((value - colour) / spread for colour in (red, green, blue))
    sector = torch.where(
        red == value,
        (from_blue - from_green).double(),
        torch.where(green == value, 2.0 + from_red.double() - from_blue, 4.0 + from_green.double() - from_red),
    )
    turned = ((sector.float().double() / 6 + 1) % 1).float().double() * 255
    saturated = (spread / value.clamp(min=1)).double() * 255
    is_grey = value == least
    hues = turned.masked_fill(is_grey, 0).to(torch.int64)
    saturations = saturated.masked_fill(is_grey, 0).to(torch.int64)
    return _rgb((hues + steps.to(torch.int64)[:, :, None]) % 256, saturations, value)


def grey(crops: Tensor, _: Tensor) -> Tensor:
    """[n, C, H, W] uint8 with the same luminance (ITU-R 601-2) in all channels."""
    return _grey(crops).expand_as(crops)


def blur(crops: Tensor, weights: Tensor) -> Tensor:
    """[n, C, H, W] uint8, the same in both directions with [n, k] weights; edges are mirrored without repeating them."""
    half = weights.shape[1] // 2
    values = torch.nn.functional.pad(crops.float(), [half] * 4, mode="reflect")
    rows, columns = crops.shape[2:]
    # Sums in a fixed order: a convolution would choose its own by the size of the batch.
    values = _sum([values[..., i : i + columns] * w[:, None, None, None] for i, w in enumerate(weights.unbind(1))])
    values = _sum([values[..., i : i + rows, :] * w[:, None, None, None] for i, w in enumerate(weights.unbind(1))])
    return values.round().clamp(0, 255).to(torch.uint8)


def solarize(crops: Tensor, thresholds: Tensor) -> Tensor:
    """[n, C, H, W] uint8; values at or above the [n, 1] thresholds are inverted."""
    return torch.where(crops >= thresholds[:, :, None, None], 255 - crops, crops)


def _blend(from_: Tensor, crops: Tensor, factors: Tensor) -> Tensor:
    """Pillow's: in single precision, the fraction cut off. Not ``lerp``, which may round otherwise."""
    blended = from_ + factors[:, :, None, None] * (crops.float() - from_)
    return blended.clamp_(0, 255).to(torch.uint8)


def _grey(crops: Tensor) -> Tensor:
    """[n, 1, H, W] uint8."""
    if crops.shape[1] == 1:
        return crops
    red, green, blue = crops.int().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


def _rgb(hues: Tensor, saturations: Tensor, value: Tensor) -> Tensor:
    """Pillow's way back from HSV: [n, H, W] each, hue and saturation whole numbers in int64 -> [n, 3, H, W] uint8."""
    sixths = hues.double() * 6 / 255
    sector = sixths.floor()
    rest = (sixths - sector).float().double()
    share = (saturations.double() / 255).float().double()
    low, falling, rising = (
        (value * (1 - part) + 0.5).floor().to(torch.uint8) for part in (share, share * rest, share * (1 - rest))
    )
    # Of each colour, what it is in the six sectors of the circle.
    red = torch.stack([value, falling, low, low, rising, value])
    green = torch.stack([rising, value, value, falling, low, low])
    blue = torch.stack([low, low, rising, value, value, falling])
    which = (sector.to(torch.int64) % 6)[None]
    colours = torch.cat([colour.gather(0, which) for colour in (red, green, blue)])
    return torch.where(saturations == 0, value, colours).transpose(0, 1)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation for operation in (flip, brightness, contrast, saturation, hue, grey, blur, solarize)
}
