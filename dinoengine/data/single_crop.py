"""The augmentation for training with labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dinoengine.config import CfgNode, configurable
from dinoengine.data.augmentation import AUGMENTATION_REGISTRY, draw_crop_box
from dinoengine.data.channels import ImageFormat, image_format, in_format, size_of
from dinoengine.data.crop_backends import checked_backend, render_crops
from dinoengine.data.crop_recipe import CropRecipe


@AUGMENTATION_REGISTRY.register()
class SingleCrop:
    """One random resized crop (bicubic) and a flip: the augmentation of DINOv2's linear evaluation."""

    @configurable
    def __init__(
        self,
        *,
        image_format: ImageFormat,
        size: tuple[int, int],
        scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        hflip_prob: float,
        backend: str = "reference",
    ) -> None:
        """
        Args:
            image_format: see ``channels``.
            size: (rows, columns) in pixels.
            scale: smallest and largest share of the image area.
            crop_ratio: width over height of the crop, log-uniform.
            backend: see ``crop_backends``.
        """
        self.image_format = image_format
        self.size = size
        self.scale = scale
        self.crop_ratio = crop_ratio
        self.hflip_prob = hflip_prob
        self.backend = checked_backend(backend)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        crops = cfg.INPUT.GLOBAL_CROPS
        return {
            "image_format": image_format(cfg),
            "size": (crops.SIZE_PX[0], crops.SIZE_PX[-1]),
            "scale": crops.SCALE,
            "crop_ratio": cfg.INPUT.CROP_RATIO,
            "hflip_prob": cfg.INPUT.HFLIP_PROB,
            "backend": cfg.INPUT.AUGMENTATION_BACKEND,
        }

    def __call__(self, image: Any, rng: np.random.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """([one tensor [C, rows, columns]], []), uint8 or, of Channels, float32 in 0..1."""
        image = in_format(image, self.image_format)
        box = draw_crop_box(size_of(image), self.scale, self.crop_ratio, rng)
        recipe = CropRecipe(box, self.size, flip=rng.random() < self.hflip_prob)
        return render_crops(image, [recipe], self.backend), []
