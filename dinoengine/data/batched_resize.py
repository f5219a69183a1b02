"""Regions of images resized as Pillow does it, many at once, on any device.

Pillow's resize of 8 bits is two passes, one for each direction; each is a weighted sum of pixels, rounded and cut to
0..255. Here each pass is a product of a batch of matrices. A region smaller than the largest of its batch is filled up, and
its weights are 0 there.

Weights are multiples of 2**-15 and go into the product as two parts of 8 bits. So every product and every sum is a whole
number below 2**24 in units of 2**-15, which float32 holds exactly, also where the device multiplies matrices in TF32 or
bfloat16 (FLOAT32_PRECISION). The result of a region depends neither on the order of summation nor on what else is in the
batch, nor on the device. Pillow's own weights have 22 bits: a few pixels in a thousand differ, by one level.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_UNITS = 2.0**15
# Values of the largest intermediate array of a batch; see ``num_values``.
MAX_VALUES = 2**24


def is_height_first(region: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether the Pillow that is installed reduces the height of a region of (rows, columns) first.

    Pillow 13 does if the height loses more than twice the pixels that the width does; before, the width was always first.
    It can be seen where both directions change, as the first pass rounds and cuts: by 0.3 of 255 on average.
    """
    lost_rows, lost_columns = region[0] - size[0], region[1] - size[1]
    return lost_rows > 0 and lost_rows > 2 * lost_columns and _pillow_version() >= 13


@functools.cache
def _pillow_version() -> int:
    import PIL

    return int(PIL.__version__.split(".")[0])


def num_values(region: tuple[int, int], size: tuple[int, int], channels: int) -> int:
    """Values of the largest intermediate array for one region of (rows, columns) that is resized to ``size``."""
    rows, columns = region
    return channels * max(rows * columns, 2 * rows * size[1], 2 * size[0] * size[1])


def resize_regions(pixels: Tensor, regions: Tensor, largest: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing, like ``image.crop(box).resize(size, BICUBIC)`` of Pillow, the width first.

    With rows for columns in all arguments and the result it is the height first. Nothing here waits for the device.

    Args:
        pixels: [P, C] uint8, the pixels of all images.
        regions: [n, 5] int64: the first pixel of each region, pixels from a row to the next and from a column to the next,
            rows, columns.
        largest: most rows and most columns of a region, known to the host.
        size: (rows, columns) of the result.

    Returns:
        [n, C, rows, columns] uint8.
    """
    channels, (most_rows, most_columns) = pixels.shape[1], largest
    first, row_step, column_step, rows, columns = (regions[:, i, None, None] for i in range(5))
    column = torch.arange(most_columns, device=pixels.device).minimum(columns - 1)
    in_row = first + column * column_step  # [n, 1, columns]
    weights = _weights(columns, most_columns, size[1])
    # A photograph of many megapixels is gathered in several parts.
    rows_at_once = max(1, MAX_VALUES // (len(regions) * channels * max(most_columns, 2 * size[1])))
    parts = []
    for row in torch.arange(most_rows, device=pixels.device).split(rows_at_once):
        indices = in_row + row[:, None].minimum(rows - 1) * row_step  # [n, part of the rows, columns]
        region = pixels.index_select(0, indices.flatten()).view(*indices.shape, channels)
        region = region.transpose(2, 3).float().flatten(1, 2)  # [n, rows * C, columns]
        parts.append(_rounded(_halves_added(torch.bmm(region, weights), dim=2)))
    narrow = torch.cat(parts, dim=1).view(len(regions), most_rows, channels * size[1])
    weights = _weights(rows, most_rows, size[0])
    crops = _rounded(_halves_added(torch.bmm(weights.transpose(1, 2), narrow), dim=1))
    return crops.view(len(regions), size[0], channels, size[1]).transpose(1, 2).to(torch.uint8)


def _weights(lengths: Tensor, most: int, num_out: int) -> Tensor:
    """The weights of Pillow's bicubic filter for an edge, in two parts that add up to them.

    Args:
        lengths: [n, 1, 1] pixels of the edge.
        most: the largest of them, known to the host.
        num_out: pixels it is resized to.

    Returns:
        [n, most, 2 * num_out] float32, 0 from ``lengths`` on.
    """
    centres = torch.arange(max(most, num_out), device=lengths.device, dtype=torch.float64) + 0.5
    scale = lengths.double() / num_out
    distance = (centres[:most, None] - centres[:num_out] * scale).div_(scale.clamp(min=1)).abs_()
    weights = _bicubic(distance).masked_fill_(centres[:most, None] > lengths, 0.0)
    weights = (weights / weights.sum(1, keepdim=True)).mul_(_UNITS).round_().div_(_UNITS).float()
    coarse = weights.bfloat16().float()
    return torch.cat([coarse, weights - coarse], dim=2)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5 (IEEE Trans. ASSP 29, 1981, Eq. 15), of distances >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _halves_added(product: Tensor, dim: int) -> Tensor:
    one, other = product.chunk(2, dim=dim)
    return one + other


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)
