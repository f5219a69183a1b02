"""What makes crops of recipes: INPUT.AUGMENTATION_BACKEND."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoengine.data.channel_crops import BLURS, render_channels
from dinoengine.data.crop_recipe import CropRecipe, render_reference
from dinoengine.data.crop_tables import Crop, pending_crops
from dinoengine.data.decoded_batch import made_crops
from dinoengine.data.fast_crops import opencv, render_fast

BACKENDS = ("reference", "fast", "device")


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


def worker_crops(image: Any, recipes: Sequence[CropRecipe], backend: str) -> Sequence[Crop]:
    """What a worker makes of an image: its crops (``render_crops``), or with "device" what they will be made of."""
    return pending_crops(image, recipes) if backend == "device" else render_crops(image, recipes, backend)


def render_crops(image: Any, recipes: Sequence[CropRecipe], backend: str) -> list[Tensor]:
    """The crops of an image as ``channels.in_format`` gives it, each [C, rows, columns] of its own memory.

    Args:
        image: PIL "RGB", "L" or "RGBA", which give uint8, or a float32 tensor, which gives float32 ("device" takes none).
        backend: one of ``BACKENDS``, "device" here on the CPU; how far their crops differ is said in ``fast_crops``,
            ``decoded_batch`` and ``channel_crops``.
    """
    if backend == "device":
        return made_crops(pending_crops(image, recipes))
    if isinstance(image, Tensor):
        return [render_channels(image, recipe, BLURS[backend]) for recipe in recipes]
    if image.mode == "RGBA":
        of_alpha = [replace(recipe, jitter=(), grey=False, solarize=None) for recipe in recipes]  # no colours
        parts = ((image.convert("RGB"), recipes), (image.getchannel("A"), of_alpha))
        colours, alphas = (render_crops(part, its_recipes, backend) for part, its_recipes in parts)
        return [torch.cat(pair) for pair in zip(colours, alphas, strict=True)]
    if backend == "reference":
        return [render_reference(image, recipe) for recipe in recipes]
    pixels = np.asarray(image)
    return [render_fast(pixels, recipe) for recipe in recipes]
