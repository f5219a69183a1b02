"""What is done to an image to make one crop of it, as plain numbers, and its making as the published training does it."""

from __future__ import annotations

from collections.abc import Callable
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
    return to_tensor(image)


def by_channels(image: Any, make: Callable[[Any], Tensor]) -> Tensor:
    """``make`` of an image; of "RGBA" of its colours and of its alpha, side by side in the result.

    Pillow would resize colours times alpha and divide them again; a crop of training, made by other means, would have other
    colours around what is transparent than a crop of evaluation.
    """
    if isinstance(image, Tensor) or image.mode != "RGBA":
        return make(image)
    return torch.cat([make(image.convert("RGB")), make(image.getchannel("A"))])


def to_tensor(image: Any) -> Tensor:
    """A crop as a tensor [C, H, W] of its own memory: PIL "RGB" or "L" in uint8, a tensor cut to 0..1 where it overshot."""
    if isinstance(image, Tensor):
        return image.clamp(0, 1)
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
