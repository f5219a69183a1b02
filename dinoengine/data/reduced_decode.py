"""JPEGs decoded at 1/2, 1/4 or 1/8 of their size where no crop needs more: INPUT.REDUCED_DECODE.

libjpeg then computes a part of each 8 x 8 block, which is a low-pass filter and saves most of the time. Random numbers are
drawn for the whole image as always; the boxes of the recipes are then scaled. A crop differs by that filter and by a shift
of less than a pixel; docs/numerics.md has figures.

How large an image is needed depends on who asks, not on the dataset, and a dataset may be of any kind and wrap others. So
the question is not handed through them: it holds while ``asking`` runs, and ``decode`` looks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np

from dinoengine.data.crop_recipe import CropRecipe

Size = tuple[int, int]  # rows, columns

_FACTORS = (8, 4, 2)
_INFO = "dinoengine_reduced"
_factor_for: ContextVar[Callable[[Size], int] | None] = ContextVar("factor_for", default=None)


@contextlib.contextmanager
def asking(factor_for: Callable[[Size], int] | None) -> Iterator[None]:
    """While it runs, JPEGs are decoded at 1 / ``factor_for(upright size)``, 1, 2, 4 or 8; None: as they are."""
    token = _factor_for.set(factor_for)
    try:
        yield
    finally:
        _factor_for.reset(token)


def reduce_before_loading(image: Any, is_sideways: bool) -> None:
    """Set the scale at which an opened PIL image will be decoded, if ``asking`` runs and it is a JPEG.

    Args:
        is_sideways: whether it will be turned by 90 degrees afterwards.
    """
    factor_for = _factor_for.get()
    if factor_for is None or image.format != "JPEG":
        return
    columns, rows = image.size
    size = (columns, rows) if is_sideways else (rows, columns)
    factor = factor_for(size)
    if factor > 1:
        image.draft(None, (columns // factor, rows // factor))
        image.info[_INFO] = (size, factor)


def whole_size(image: Any) -> tuple[Size, int]:
    """(size of the whole upright image, by what it was reduced); ask before the image is converted. Arrays never are."""
    if isinstance(image, np.ndarray):
        return (image.shape[0], image.shape[1]), 1
    reduced: tuple[Size, int] = image.info.get(_INFO, ((image.height, image.width), 1))
    return reduced


def largest_factor(recipes: Sequence[CropRecipe]) -> int:
    """The largest reduction with which no crop would have to be enlarged more than it is anyhow: 1, 2, 4 or 8."""
    least = min(min(r.box[2] / r.size[0], r.box[3] / r.size[1]) for r in recipes)
    return next((factor for factor in _FACTORS if factor <= least), 1)


def scaled(recipe: CropRecipe, factor: int, reduced: Size) -> CropRecipe:
    """The recipe for an image that was reduced to ``reduced``; edges of the box are rounded to whole pixels of it."""
    top, left, height, width = recipe.box
    first_row, first_column = round(top / factor), round(left / factor)
    last_row = min(round((top + height) / factor), reduced[0])
    last_column = min(round((left + width) / factor), reduced[1])
    return replace(recipe, box=(first_row, first_column, last_row - first_row, last_column - first_column))
