"""What is to be done to the images of a batch, as tables that a device can follow without asking the host.

Made by the workers, in plain numbers: which pixels are a crop's region, in which groups regions are resized, and for each
operation the crops that it is done to, in the order drawn. What decides about shapes stays on the host (``CropPlan``); what
the device needs are the images and three tensors (``CropTables``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoengine.data.batched_resize import MAX_VALUES, is_height_first, num_values
from dinoengine.data.crop_recipe import CropRecipe

_JITTER = ("brightness", "contrast", "saturation", "hue")


class PendingCrop(NamedTuple):
    """A crop that is not made yet.

    Attributes:
        image: [H, W, C] uint8, the part of the image that its crops need.
        recipe: with its box in that part.
    """

    image: Tensor
    recipe: CropRecipe


# What an augmentation gives: [C, H, W], or what that will be made of on the device.
Crop = Tensor | PendingCrop


class Resize(NamedTuple):
    """Regions ``first`` to ``last`` of the table, which are resized together; most rows and columns of one.

    ``height_first``: all of this, and what the table says of these regions, has rows for columns (``batched_resize``).
    """

    first: int
    last: int
    largest: tuple[int, int]
    height_first: bool


class Step(NamedTuple):
    """An operation and the crops it is done to: numbers ``first`` to ``last`` of ``rows``, with ``width`` values each from
    ``first_value`` on."""

    operation: str
    first: int
    last: int
    first_value: int
    width: int


@dataclass(frozen=True)
class CropPlan:
    """How the crops of one size are made; known to the host.

    Attributes:
        size: (rows, columns).
        num_crops: that are made.
        num_channels: of the images.
        resizes, steps: done in this order.
    """

    size: tuple[int, int]
    num_crops: int
    num_channels: int
    resizes: tuple[Resize, ...]
    steps: tuple[Step, ...]


class CropTables(NamedTuple):
    """The images of a batch and all numbers of its crops.

    Attributes:
        pixels: [P, C] uint8, of all images, row by row.
        regions: [K, 6] int64: those of ``resize_regions``, and the place of the crop in its plan.
        rows: [R] int64, the places that steps name.
        values: [V] float32, what operations are told.
    """

    pixels: Tensor
    regions: Tensor
    rows: Tensor
    values: Tensor


def pending_crops(image: Any, recipes: Sequence[CropRecipe]) -> list[PendingCrop]:
    """The crops of a ``PIL.Image`` "RGB", "L" or "RGBA", to be made later.

    They share a copy of the smallest part of the image that holds all of them.

    Raises:
        ValueError: for an array (INPUT.FORMAT channels).
    """
    if isinstance(image, Tensor):
        raise ValueError(
            f"The augmentation backend 'device' makes crops of pictures of 8 bits; got an array of shape "
            f"{tuple(image.shape)}. Take 'reference' or 'fast'."
        )
    boxes = [recipe.box for recipe in recipes]
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    part = np.array(image.crop((left, top, right, bottom)))
    tensor = torch.from_numpy(part.reshape(*part.shape[:2], -1))
    within = [(box[0] - top, box[1] - left, box[2], box[3]) for box in boxes]
    return [PendingCrop(tensor, replace(recipe, box=box)) for recipe, box in zip(recipes, within, strict=True)]


def tabulate_crops(groups: Sequence[Sequence[PendingCrop]]) -> tuple[CropTables, tuple[CropPlan, ...]]:
    """Tables for all crops of a batch, and a plan for each group; the crops of a group have one size."""
    images = {id(crop.image): crop.image for crops in groups for crop in crops}
    ends = np.cumsum([image.shape[0] * image.shape[1] for image in images.values()]).tolist()
    starts = dict(zip(images, [0, *ends], strict=False))
    regions: list[tuple[int, ...]] = []
    rows: list[int] = []
    values: list[float] = []
    plans = []
    for crops in groups:
        size, channels = crops[0].recipe.size, crops[0].image.shape[2]
        assert all((crop.recipe.size, crop.image.shape[2]) == (size, channels) for crop in crops), (
            "crops of several sizes"
        )
        resizes: list[Resize] = []
        for height_first in (False, True):
            first = len(regions)
            regions += _regions(crops, starts, height_first)
            resizes += _resizes(regions, first, size[::-1] if height_first else size, channels, height_first)
        steps = []
        for operation, done_to in _operations([crop.recipe for crop in crops]):
            width = len(done_to[0][1])
            steps.append(Step(operation, len(rows), len(rows) + len(done_to), len(values), width))
            rows += [place for place, _ in done_to]
            values += [value for _, its_values in done_to for value in its_values]
        plans.append(CropPlan(size, len(crops), channels, tuple(resizes), tuple(steps)))
    tables = CropTables(
        torch.cat([image.flatten(0, 1) for image in images.values()]),
        torch.tensor(regions, dtype=torch.int64),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float32),
    )
    return tables, tuple(plans)


def _regions(
    crops: Sequence[PendingCrop], starts: Mapping[int, int], height_first: bool
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Those of the crops that are resized so, small ones first: neighbours of like size are filled up little.

    Args:
        starts: ``id`` of an image -> its first pixel.
    """
    boxes = [crop.recipe.box for crop in crops]
    chosen = [i for i, crop in enumerate(crops) if is_height_first(boxes[i][2:], crop.recipe.size) == height_first]
    for place in sorted(chosen, key=lambda i: boxes[i][2] * boxes[i][3]):
        image, (top, left, height, width) = crops[place].image, boxes[place]
        stride = image.shape[1]
        first = starts[id(image)] + top * stride + left
        yield (first, 1, stride, width, height, place) if height_first else (first, stride, 1, height, width, place)


def _resizes(
    regions: Sequence[tuple[int, ...]], first: int, size: tuple[int, int], channels: int, height_first: bool
) -> Iterator[Resize]:
    """The regions from ``first`` on, as many at once as MAX_VALUES allows, one at least."""
    largest = (0, 0)
    for number in range(first, len(regions)):
        rows, columns = regions[number][3:5]
        larger = max(largest[0], rows), max(largest[1], columns)
        if number > first and (number + 1 - first) * num_values(larger, size, channels) > MAX_VALUES:
            yield Resize(first, number, largest, height_first)
            first, larger = number, (rows, columns)
        largest = larger
    if first < len(regions):
        yield Resize(first, len(regions), largest, height_first)


def _operations(recipes: Sequence[CropRecipe]) -> Iterator[tuple[str, list[tuple[int, tuple[float, ...]]]]]:
    """(operation, [(place of a crop, what the operation is told)]) in the order of ``render_reference``; none is empty."""
    for operation, done_to in _all_operations(recipes):
        if done_to:
            yield operation, done_to


def _all_operations(recipes: Sequence[CropRecipe]) -> Iterator[tuple[str, list[tuple[int, tuple[float, ...]]]]]:
    numbered = list(enumerate(recipes))
    yield "flip", [(i, ()) for i, recipe in numbered if recipe.flip]
    for turn in range(max(len(recipe.jitter) for recipe in recipes)):
        drawn = [(i, *recipe.jitter[turn]) for i, recipe in numbered if turn < len(recipe.jitter)]
        for operation in _JITTER:
            yield operation, [(i, (_told(name, factor),)) for i, name, factor in drawn if name == operation]
    yield "grey", [(i, ()) for i, recipe in numbered if recipe.grey]
    blurs = [(i, *recipe.blur) for i, recipe in numbered if recipe.blur is not None]
    for width in sorted({kernel for _, kernel, _ in blurs}):
        yield "blur", [(i, _gaussian(kernel, sigma)) for i, kernel, sigma in blurs if kernel == width]
    yield "solarize", [(i, (recipe.solarize,)) for i, recipe in numbered if recipe.solarize is not None]


def _told(operation: str, factor: float) -> float:
    # As torchvision does: of a circle of 256 steps, the fraction cut off in double precision.
    return int(factor * 255) % 256 if operation == "hue" else factor


def _gaussian(kernel: int, sigma: float) -> tuple[float, ...]:
    weights = [math.exp(-0.5 * ((i - (kernel - 1) / 2) / sigma) ** 2) for i in range(kernel)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)
