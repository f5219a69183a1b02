"""The augmentation for training with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dinoengine.config import CfgNode, configurable
from dinoengine.data.augmentation import AUGMENTATION_REGISTRY, draw_crop_box
from dinoengine.data.channels import ImageFormat, image_format, in_format, size_of
from dinoengine.data.crop_backends import checked_backend, worker_crops
from dinoengine.data.crop_recipe import CropRecipe
from dinoengine.data.crop_tables import Crop
from dinoengine.data.reduced_decode import largest_factor, scaled, whole_size


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
        reduced_decode: bool = False,
    ) -> None:
        """
        Args:
            image_format: see ``channels``.
            size: (rows, columns) in pixels.
            scale: smallest and largest share of the image area.
            crop_ratio: width over height of the crop, log-uniform.
            backend: see ``crop_backends``.
            reduced_decode: see ``reduced_decode``.
        """
        self.image_format = image_format
        self.size = size
        self.scale = scale
        self.crop_ratio = crop_ratio
        self.hflip_prob = hflip_prob
        self.backend = checked_backend(backend)
        self.reduced_decode = reduced_decode

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
            "reduced_decode": cfg.INPUT.REDUCED_DECODE,
        }

    def __call__(self, image: Any, rng: np.random.Generator) -> tuple[Sequence[Crop], Sequence[Crop]]:
        """([one tensor [C, rows, columns]], []), uint8 or, of Channels, float32 in 0..1; or pending."""
        size, factor = whole_size(image)
        image = in_format(image, self.image_format)
        recipe = self._recipe(size, rng)
        if factor > 1:
            recipe = scaled(recipe, factor, size_of(image))
        return worker_crops(image, [recipe], self.backend), []

    def reduction(self, size: tuple[int, int], rng: np.random.Generator) -> int:
        """See ``MultiCrop.reduction``."""
        return largest_factor([self._recipe(size, rng)]) if self.reduced_decode else 1

    def _recipe(self, size: tuple[int, int], rng: np.random.Generator) -> CropRecipe:
        box = draw_crop_box(size, self.scale, self.crop_ratio, rng)
        return CropRecipe(box, self.size, flip=rng.random() < self.hflip_prob)
