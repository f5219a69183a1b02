"""Random crops of an image and its mask, for training on the class of each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinoengine.data.augmentation import pil_to_tensor
from dinoengine.data.collate import LabelledImage
from dinoengine.data.dataset import DataError, ImageDataset
from dinoengine.data.decode import to_format
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.data.samplers import TrainingSampler
from dinoengine.structures import IGNORE


class MaskCrop:
    """Random size, random crop, flip, of an image (bicubic) and its mask (nearest) alike.

    Where the resized image is smaller than the crop it is extended to the right and below, black and ignored.
    """

    def __init__(
        self,
        image_format: str,
        *,
        resize_px: int,
        crop_size: tuple[int, int],
        resize_ratio: tuple[float, float],
        hflip_prob: float,
    ) -> None:
        """
        Args:
            image_format: "RGB" or "L".
            resize_px: shorter side before the random factor; 0: that of the image.
            crop_size: (rows, columns).
            resize_ratio: smallest and largest factor, uniform.
        """
        self.image_format = image_format
        self.resize_px = resize_px
        self.crop_size = crop_size
        self.resize_ratio = resize_ratio
        self.hflip_prob = hflip_prob

    def __call__(self, image: Any, mask: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """PIL image and [H, W] uint8 -> uint8 tensors [C, rows, columns] and [rows, columns]."""
        from PIL import Image

        image = to_format(image, self.image_format)
        shorter = min(image.size)
        factor = rng.uniform(*self.resize_ratio) * (self.resize_px or shorter) / shorter
        width, height = (max(1, round(side * factor)) for side in image.size)
        rows, columns = self.crop_size
        top = int(rng.integers(0, max(height - rows, 0) + 1))
        left = int(rng.integers(0, max(width - columns, 0) + 1))
        box = (left, top, min(left + columns, width), min(top + rows, height))
        pixels = pil_to_tensor(image.resize((width, height), Image.Resampling.BICUBIC).crop(box))
        classes = pil_to_tensor(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST).crop(box))[0]
        filled_image = torch.zeros((len(pixels), rows, columns), dtype=torch.uint8)
        filled_mask = torch.full((rows, columns), IGNORE, dtype=torch.uint8)
        filled_image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        filled_mask[: pixels.shape[1], : pixels.shape[2]] = classes
        if rng.random() < self.hflip_prob:
            return filled_image.flip(-1), filled_mask.flip(-1)
        return filled_image, filled_mask


class MaskStream(Dataset[LabelledImage]):
    """position -> crop and mask; a pure function of (seed, position)."""

    def __init__(self, dataset: ImageDataset, sampler: TrainingSampler, crop: MaskCrop, seed: int) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.crop = crop
        self.seed = seed

    def __getitem__(self, position: int) -> LabelledImage:
        index = self.sampler.index_at(position)
        try:
            image, mask = self.dataset.load(index), self.dataset.load_mask(index)
            assert mask is not None
            crop = self.crop(image, mask, position_rng(self.seed, position, CROPS))
        except Exception as error:
            raise DataError(f"Loading or cropping {self.dataset.describe(index)} failed: {error}") from error
        return LabelledImage(crop[0], None, index, crop[1])
