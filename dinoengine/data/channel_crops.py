"""The crop of a recipe for INPUT.FORMAT "channels", in float32: nothing is rounded between operations.

Each operation is that of ``render_reference`` carried over to any number of channels: the same filter, the same blend, cut
to 0..1 where 8 bits end at 0 and 255. Contrast goes by the mean of each channel, as channels need have nothing in common.
Saturation, hue and grey mix channels that are colours; there are none here, and no recipe has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinoengine.data.crop_recipe import CropRecipe
from dinoengine.data.fast_crops import opencv

Blur = Callable[[Tensor, int, float], Tensor]


def render_channels(image: Tensor, recipe: CropRecipe, blur: Blur) -> Tensor:
    """
    Args:
        image: [C, H, W] float32 in 0..1; is not changed.
        blur: one of ``BLURS``.

    Returns:
        [C, rows, columns] float32 in 0..1 of its own memory.
    """
    top, left, height, width = recipe.box
    crop = image[:, top : top + height, left : left + width]
    if (height, width) != recipe.size:
        crop = torch.nn.functional.interpolate(crop[None], recipe.size, mode="bicubic", antialias=True)[0]
    crop = crop.flip(-1) if recipe.flip else crop
    crop = crop.clamp(0, 1)
    for operation, factor in recipe.jitter:
        crop = _JITTER[operation](crop, factor).clamp_(0, 1)
    if recipe.blur is not None:
        crop = blur(crop, *recipe.blur)
    if recipe.solarize is not None:
        crop = torch.where(crop >= recipe.solarize / 255, 1 - crop, crop)
    return crop


def _brightness(crop: Tensor, factor: float) -> Tensor:
    return crop * factor


def _contrast(crop: Tensor, factor: float) -> Tensor:
    return torch.lerp(crop.mean(dim=(1, 2), keepdim=True), crop, factor)


def _blur_by_torchvision(crop: Tensor, kernel: int, sigma: float) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    blurred: Tensor = gaussian_blur(crop, [kernel, kernel], [sigma, sigma])
    return blurred


def _blur_by_opencv(crop: Tensor, kernel: int, sigma: float) -> Tensor:
    cv2 = opencv()
    blurred = torch.empty_like(crop)
    for plane, target in zip(crop.numpy(), blurred.numpy(), strict=True):
        cv2.GaussianBlur(plane, (kernel, kernel), sigma, dst=target, borderType=cv2.BORDER_REFLECT_101)
    return blurred


_JITTER = {"brightness": _brightness, "contrast": _contrast}
# By INPUT.AUGMENTATION_BACKEND: the same weights, added up in another order.
BLURS: dict[str, Blur] = {"reference": _blur_by_torchvision, "fast": _blur_by_opencv}
