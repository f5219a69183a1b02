"""From stored pixels to network input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """(pixels - mean) / std per channel, on the device: crops travel as uint8, a quarter of the bytes."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """
        Args:
            mean, std: one value per channel, for pixels in 0..1.
        """
        super().__init__()
        # Not in the state dict: they are configuration (MODEL.PIXEL_MEAN/STD), stored with it.
        self.register_buffer("pixel_mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] uint8 (0..255) or float (0..1) -> float32 of the same shape.

        Raises:
            ValueError: if it is no batch, the number of channels is not that of mean and std, or the values are whole
                numbers of another type, which have no range of their own.
        """
        if images.ndim != 4:
            hint = "; a single image becomes a batch by images[None]" if images.ndim == 3 else ""
            raise ValueError(f"Expected a batch of images [B, C, H, W], got the shape {tuple(images.shape)}{hint}.")
        if images.shape[1] != self.pixel_mean.shape[0]:
            raise ValueError(
                f"Got images with {images.shape[1]} channels, the model takes {self.pixel_mean.shape[0]} "
                "(the length of MODEL.PIXEL_MEAN); see INPUT.FORMAT."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(
                f"Got images of {images.dtype}; expected uint8 (0..255) or floats in 0..1: map other values as in "
                "training, (values - low) / (high - low) with its INPUT.VALUE_RANGE."
            )
        pixels = images.float() / 255.0 if images.dtype == torch.uint8 else images.float()
        return (pixels - self.pixel_mean) / self.pixel_std
