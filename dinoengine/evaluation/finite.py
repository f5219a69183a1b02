"""Which images have features that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoengine.data import ImageDataset
from dinoengine.utils import comm


class FiniteCheck:
    """Notes such images on each process and reports them on all: an error on one alone would leave the others waiting."""

    def __init__(self) -> None:
        self._bad: list[int] = []
        self._num_seen = 0

    def see(self, values: Tensor, indices: Tensor) -> None:
        """[B, ...] of the images with these indices, [B]."""
        is_bad = ~torch.isfinite(values.flatten(1)).all(dim=1)
        self._bad += indices.cpu()[is_bad.cpu()].tolist()
        self._num_seen += len(indices)

    def finish(self) -> None:
        """
        Raises:
            ValueError: on every process, if any has seen a value that is not finite; names images.
        """
        parts = comm.all_gather((self._bad, self._num_seen))
        if bad := sorted(index for part, _ in parts for index in part):
            raise ValueError(not_finite(bad, sum(seen for _, seen in parts), None))


def not_finite(images: Sequence[int], num_images: int, dataset: ImageDataset | None) -> str:
    """The message for features with NaN or infinity; names some of the images."""
    some = images[:5]
    which = f"images number {list(some)}" if dataset is None else ", ".join(dataset.describe(i) for i in some)
    return (
        f"The features of {len(images)} of {num_images} images are not finite, e.g. {which}. The weights are broken, or "
        "the run diverged."
    )
