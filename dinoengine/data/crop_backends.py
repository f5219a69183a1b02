"""What makes crops of recipes: INPUT.AUGMENTATION_BACKEND."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dinoengine.data.crop_recipe import CropRecipe, render_reference
from dinoengine.data.fast_crops import opencv, render_fast

BACKENDS = ("reference", "fast")


def checked_backend(backend: str) -> str:
    """A name in ``BACKENDS`` whose libraries are there.

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: if a library is missing; says which.
    """
    if backend not in BACKENDS:
        raise ValueError(f"The augmentation backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if backend == "fast":
        opencv()
    return backend


def render_crops(image: Any, recipes: Sequence[CropRecipe], backend: str) -> list[Tensor]:
    """The crops of a PIL image, "RGB" or "L", each [C, rows, columns] uint8.

    Args:
        backend: "reference" or "fast"; how far their crops differ is said in ``fast_crops``.
    """
    if backend == "reference":
        return [render_reference(image, recipe) for recipe in recipes]
    pixels = np.asarray(image)
    return [render_fast(pixels, recipe) for recipe in recipes]
