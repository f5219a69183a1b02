"""The crop of a recipe, several times as fast as with torchvision on Pillow images: INPUT.AUGMENTATION_BACKEND "fast".

Only the region of the crop is touched. It is resized by torch's uint8 kernel, which has Pillow's bicubic filter with its
antialiasing; colour and blur are OpenCV's, on uint8; a crop turned grey has one channel until its end.

How far each operation is from ``render_reference``: at most a level of 255 nearly everywhere, 0.7 on average after a change
of hue; the table is in docs/numerics.md, and tests/data/test_fast_crops.py holds it to that.

Nothing here depends on the process, on other crops or on anything drawn before.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoengine.data.crop_recipe import CropRecipe

# Added before OpenCV rounds: the fraction is cut off, and a whole number stays one.
_CUT = -0.499


def render_fast(image: np.ndarray, recipe: CropRecipe) -> Tensor:
    """
    Args:
        image: [H, W, 3] or [H, W] uint8; is not changed.

    Returns:
        [C, rows, columns] uint8 of its own memory.
    """
    cv2 = opencv()
    crop = _resize(image, recipe.box, recipe.size)
    if recipe.flip:
        crop = cv2.flip(crop, 1)
    for operation, factor in recipe.jitter:
        crop = _JITTER[operation](crop, factor)
    if recipe.grey:
        crop = _grey(crop)
    if recipe.blur is not None:
        crop = _blur(crop, *recipe.blur)
    if recipe.solarize is not None:
        crop = cv2.LUT(crop, _solarize_table(recipe.solarize))
    return _channels_first(crop, 3 if image.ndim == 3 else 1)


@functools.cache
def opencv() -> Any:
    """OpenCV, on the thread that calls it alone: each worker has one image at a time.

    Raises:
        ModuleNotFoundError: if it is not installed; says what to do.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "INPUT.AUGMENTATION_BACKEND 'fast' needs OpenCV, which is not installed: pip install "
            "'dinoengine[fast]', or set 'reference', which needs nothing more."
        ) from error
    cv2.setNumThreads(0)
    return cv2


def _resize(image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    top, left, height, width = box
    # Channels stay last: torch has a vectorised kernel for that layout, and OpenCV takes no other. The copy also makes
    # the memory of a PIL image, which is read-only, one that torch accepts.
    region = torch.from_numpy(image[top : top + height, left : left + width].copy())
    batch = region.reshape(1, height, width, -1).permute(0, 3, 1, 2)
    if (height, width) != size:
        batch = torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)
    crop = batch.permute(0, 2, 3, 1)[0].numpy()
    return np.ascontiguousarray(crop if image.ndim == 3 else crop[:, :, 0])


def _channels_first(crop: np.ndarray, channels: int) -> Tensor:
    out = np.empty((channels, *crop.shape[:2]), dtype=np.uint8)
    if crop.ndim == 2:
        out[:] = crop
    else:
        opencv().split(crop, list(out))
    return torch.from_numpy(out)


# Pillow's blend, which is all of these three, cuts the fraction off.


def _brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return opencv().addWeighted(crop, factor, crop, 0, _CUT)


def _contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    mean = int(opencv().mean(_grey(crop))[0] + 0.5)
    return opencv().addWeighted(crop, factor, crop, 0, mean * (1 - factor) + _CUT)


def _saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    cv2 = opencv()
    grey = cv2.cvtColor(_grey(crop), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(crop, factor, grey, 1 - factor, _CUT)


def _blur(crop: np.ndarray, kernel: int, sigma: float) -> np.ndarray:
    cv2 = opencv()
    # OpenCV has weights of 8 bits: taps that are 0 in them only cost time. exp(-r * r / (2 * sigma * sigma)) < 1 / 1024.
    reach = int(sigma * math.sqrt(2 * math.log(1024)))
    width = min(kernel, 2 * reach + 1)
    return cv2.GaussianBlur(crop, (width, width), sigma, borderType=cv2.BORDER_REFLECT_101) if width > 1 else crop


def _solarize_table(threshold: int) -> np.ndarray:
    levels = np.arange(256, dtype=np.uint8)
    levels[threshold:] = 255 - levels[threshold:]
    return levels


def _hue(crop: np.ndarray, factor: float) -> np.ndarray:
    cv2 = opencv()
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    turn = np.zeros(hsv.shape[1:], dtype=np.uint8)
    turn[:, 0] = int(factor * 255) % 256
    hsv += turn  # whole rows at once; hue is a circle of 256 steps and uint8 wraps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _grey(crop: np.ndarray) -> np.ndarray:
    return crop if crop.ndim == 2 else opencv().cvtColor(crop, opencv().COLOR_RGB2GRAY)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}
