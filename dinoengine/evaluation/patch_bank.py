"""A random sample of the patches of a whole dataset, with the class of each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dinoengine.data import ImageDataset
from dinoengine.evaluation.features import Features
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.structures import IGNORE
from dinoengine.utils import comm
from dinoengine.utils.env import hash_seed


def patch_classes(masks: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The class that most pixels of a patch have, of equals the smaller number.

    Args:
        masks: [B, H, W] uint8, H and W multiples of the grid; ``IGNORE`` does not count.
        grid: (rows, columns) of patches.

    Returns:
        [B, N] int64; ``IGNORE`` for a patch without any class.
    """
    batch, height, width = masks.shape
    rows, columns = grid
    cells = masks.view(batch, rows, height // rows, columns, width // columns).permute(0, 1, 3, 2, 4)
    pixels = (
        cells.reshape(batch, rows * columns, -1).long().clamp(max=num_classes)
    )  # ignored ones: a class of their own
    counts = torch.zeros(batch, rows * columns, num_classes + 1, dtype=torch.int32, device=masks.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=torch.int32))
    counts = counts[..., :num_classes]
    return counts.argmax(2).masked_fill(~counts.any(2), IGNORE)


class PatchBank:
    """Keeps at most ``num_patches`` patches of those that it is shown, a uniform sample without replacement.

    Every patch has a random key, a function of (seed, image, patch); those with the smallest keys stay. So the sample is
    the same for any batch size and number of processes, and never more than it is held.
    """

    def __init__(
        self, num_patches: int, num_classes: int, *, seed: int, balanced: bool, dataset: ImageDataset | None = None
    ) -> None:
        """
        Args:
            num_patches: over all processes.
            balanced: sample up to num_patches // num_classes of each class, instead of up to num_patches of all.
            dataset: names its images in messages.
        """
        self.num_patches = num_patches
        self.num_classes = num_classes
        self.seed = seed
        self.balanced = balanced
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._classes = torch.zeros(0, dtype=torch.int64)
        self._features: Tensor | None = None
        self._finite = FiniteCheck(dataset)

    def add(self, features: Tensor, classes: Tensor, indices: Tensor) -> None:
        """
        Args:
            features: [B, N, D].
            classes: [B, N] int64, ``IGNORE`` for patches that are not to be in the bank.
            indices: [B], of the images in their dataset.
        """
        self._finite.see(features, indices)
        num_images, num_patches, dim = features.shape
        keys = torch.stack([self._keys_of(index, num_patches) for index in indices.tolist()]).flatten()
        classes = classes.cpu().flatten()
        known = (classes != IGNORE).nonzero().flatten()
        num_old = len(self._keys)
        all_keys = torch.cat([self._keys, keys[known]])
        all_classes = torch.cat([self._classes, classes[known]])
        kept = self._smallest(all_keys, all_classes)
        old, new = kept[kept < num_old], known[kept[kept >= num_old] - num_old]
        rows = features.reshape(num_images * num_patches, dim)[new.to(features.device)].to("cpu", torch.float32)
        self._features = rows if self._features is None else torch.cat([self._features[old], rows])
        self._keys = torch.cat([self._keys[old], keys[new]])
        self._classes = torch.cat([self._classes[old], classes[new]])

    def _keys_of(self, index: int, num_patches: int) -> Tensor:
        generator = np.random.Generator(np.random.Philox(hash_seed(self.seed, index)))
        return torch.from_numpy(generator.random(num_patches))

    def _smallest(self, keys: Tensor, classes: Tensor) -> Tensor:
        """Numbers of the rows that stay, smallest key first."""
        order = keys.argsort()
        if not self.balanced:
            return order[: self.num_patches]
        quota = self.num_patches // self.num_classes
        is_kept = torch.zeros(len(keys), dtype=torch.bool)
        for number in range(self.num_classes):
            is_kept[order[classes[order] == number][:quota]] = True
        return order[is_kept[order]]

    def finish(self) -> Features:
        """The sample of what all processes were shown, in the order of the keys; the same on each.

        Raises:
            ValueError: if a feature was not finite (names the images), or no patch has a class.
        """
        self._finite.finish()
        sizes = comm.all_gather(len(self._keys))
        parts = comm.all_gather((self._keys, self._classes))
        kept = self._smallest(torch.cat([keys for keys, _ in parts]), torch.cat([classes for _, classes in parts]))
        if not len(kept):
            raise ValueError("No patch of the training set has a pixel with a class, or the bank has no room for one.")
        # Keys first, so that only rows that stay travel.
        own = kept - sum(sizes[: comm.get_rank()])
        own = own[(own >= 0) & (own < len(self._keys))]
        features = self._features[own] if self._features is not None else None
        rows = comm.all_gather((self._keys[own], self._classes[own], features))
        order = torch.cat([keys for keys, _, _ in rows]).argsort()
        merged = torch.cat([part for _, _, part in rows if part is not None])
        return Features(merged[order], torch.cat([classes for _, classes, _ in rows])[order])
