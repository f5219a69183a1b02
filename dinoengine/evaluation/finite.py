"""Which images have features that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from dinoengine.utils import comm


class FiniteCheck:
    """Notes such images on each process and reports them on all: an error on one alone would leave the others waiting."""

    def __init__(self) -> None:
        self._bad: list[int] = []
        self._num_seen = 0

    def see(self, values: Tensor, indices: Tensor) -> None:
        """[B, ...] of the images with these indices, [B]."""
        is_bad = ~torch.isfinite(values.flatten(1)).all(dim=1)
        self._bad += indices[is_bad].tolist()
        self._num_seen += len(indices)

    def finish(self) -> None:
        """
        Raises:
            ValueError: on every process, if any has seen a value that is not finite; names images.
        """
        parts = comm.all_gather((self._bad, self._num_seen))
        if bad := sorted(index for part, _ in parts for index in part):
            raise ValueError(
                f"The features of {len(bad)} of {sum(seen for _, seen in parts)} images are not finite, e.g. images number "
                f"{bad[:5]}. The weights are broken, or the run diverged."
            )
