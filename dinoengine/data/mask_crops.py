"""Random crops of an image and its mask, for training on the class of each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinoengine.data.channels import ImageFormat, in_format, size_of
from dinoengine.data.collate import LabelledImage
from dinoengine.data.crop_recipe import by_channels, to_tensor
from dinoengine.data.dataset import DataError, ImageDataset
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.data.samplers import TrainingSampler
from dinoengine.structures import IGNORE
from dinoengine.utils.printable import printable


class MaskCrop:
    """Random size, random crop, flip, of an image (bicubic) and its mask (nearest) alike.

    Where the resized image is smaller than the crop it is extended to the right and below, black and ignored.
    """

    def __init__(
        self,
        image_format: ImageFormat,
        *,
        resize_px: int,
        crop_size: tuple[int, int],
        resize_ratio: tuple[float, float],
        hflip_prob: float,
    ) -> None:
        """
        Args:
            image_format: see ``channels``.
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
        """An image as a dataset loads it and [H, W] uint8 -> tensors [C, rows, columns], uint8 or, of Channels, float32 in
        0..1, and [rows, columns] uint8."""
        from PIL import Image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        image = in_format(image, self.image_format)
        shorter = min(size_of(image))
        factor = rng.uniform(*self.resize_ratio) * (self.resize_px or shorter) / shorter
        height, width = (max(1, round(side * factor)) for side in size_of(image))
        rows, columns = self.crop_size
        top = int(rng.integers(0, max(height - rows, 0) + 1))
        left = int(rng.integers(0, max(width - columns, 0) + 1))
        box = (top, left, min(rows, height - top), min(columns, width - left))

        def crop(part: Any, interpolation: InterpolationMode) -> Tensor:
            return to_tensor(F.crop(F.resize(part, [height, width], interpolation), *box))

        pixels = by_channels(image, lambda part: crop(part, InterpolationMode.BICUBIC))
        classes = crop(Image.fromarray(mask), InterpolationMode.NEAREST)[0]
        filled_image = torch.zeros((len(pixels), rows, columns), dtype=pixels.dtype)
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
            raise DataError(f"Loading or cropping {printable(self.dataset.describe(index))} failed: {error}") from error
        return LabelledImage(crop[0], None, index, crop[1])
