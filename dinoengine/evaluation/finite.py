"""Which images have features that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from dinoengine.data import ImageDataset
from dinoengine.utils import comm
from dinoengine.utils.printable import printable

_MOST_NAMES = 5


class FiniteCheck:
    """Notes such images on each process and reports them on all: an error on one alone would leave the others waiting."""

    def __init__(
        self,
        dataset: ImageDataset | None,
        what: str = "features",
        cause: str = "The weights are broken, or the run diverged.",
    ) -> None:
        """
        Args:
            dataset: names its images in the message; None: they are numbered.
            what: is not finite.
            cause: the end of the message.
        """
        self.dataset = dataset
        self.what = what
        self.cause = cause
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
        self._require_none(sorted(i for part, _ in parts for i in part), sum(seen for _, seen in parts))

    def finish_here(self) -> None:
        """As ``finish``, of this process alone: where processes have different numbers of batches and none waits."""
        self._require_none(self._bad, self._num_seen)

    def finish_batch(self, device: torch.device) -> None:
        """As ``finish``, in every iteration: names travel only if there are any, else a sum on ``device``."""
        if comm.all_reduce_sum(torch.tensor(len(self._bad), device=device)).item():
            self.finish()

    def _require_none(self, bad: list[int], num_seen: int) -> None:
        if not bad:
            return
        some = bad[:_MOST_NAMES]
        describe = None if self.dataset is None else self.dataset.describe
        which = f"images number {some}" if describe is None else ", ".join(printable(describe(i)) for i in some)
        raise ValueError(
            f"The {self.what} of {len(bad)} of {num_seen} images are not finite, e.g. {which}. {self.cause}"
        )
