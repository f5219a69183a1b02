"""What is done to an image to make one crop of it, as plain numbers, and its making as the published training does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CropRecipe:
    """All random numbers of a crop, drawn before a pixel is looked at, so that any backend can follow them.

    Attributes:
        box: (top, left, height, width) in the image.
        size: (rows, columns) of the crop.
        jitter: (operation, factor) in their order; operations are "brightness", "contrast", "saturation" and "hue" with
            factors as torchvision's ``adjust_*`` take them.
        blur: (kernel width in pixels, sigma in pixels); None: no blur.
        solarize: values at or above it are inverted; None: none are.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    blur: tuple[int, float] | None = None
    solarize: int | None = None


def render_reference(image: Any, recipe: CropRecipe) -> Tensor:
    """The crop by the operations of torchvision on Pillow images that the published training uses.

    Args:
        image: a PIL image, "RGB" or "L".

    Returns:
        [C, rows, columns] uint8.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image = F.resized_crop(image, *recipe.box, list(recipe.size), InterpolationMode.BICUBIC)
    if recipe.flip:
        image = F.hflip(image)
    for operation, factor in recipe.jitter:
        image = getattr(F, f"adjust_{operation}")(image, factor)
    if recipe.grey:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if recipe.blur is not None:
        kernel, sigma = recipe.blur
        image = F.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
    if recipe.solarize is not None:
        image = F.solarize(image, recipe.solarize)
    return pil_to_tensor(image)


def pil_to_tensor(image: Any) -> Tensor:
    """PIL "RGB" or "L" -> uint8 tensor [C, H, W] of its own memory."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
