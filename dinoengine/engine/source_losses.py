"""The loss of each dataset of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoengine.utils import comm

_PREFIX = "loss/source/"


class SourceLosses:
    """Sums the losses of images by the dataset that each is from, on the device: nothing waits for it between two readings.

    The mean over images of what each adds is the objective. So the means of the sources, weighted with how many images were
    from each, add up to the mean ``total_loss`` of the same iterations.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """
        Args:
            names: of the datasets, in their order; those of one name are told apart by a number. Empty: nothing is summed.
        """
        self.names = [_PREFIX + (name if names[:i].count(name) == 0 else f"{name} {i}") for i, name in enumerate(names)]
        # Sums, and numbers of images: of the step, and of the steps since the last reading.
        self._step = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self._totals = torch.zeros_like(self._step)

    @torch.no_grad()
    def add(self, sources: Tensor | None, per_image: Tensor | None) -> None:
        """Take a batch, or a part of one.

        Args:
            sources: [B] int64, which dataset each image is from.
            per_image: [B] its loss. Without both nothing is added.
        """
        if self.names and sources is not None and per_image is not None:
            self._step.index_add_(1, sources, torch.stack((per_image, torch.ones_like(per_image))).double())

    def end_step(self, counts: bool) -> None:
        """Called when all parts of a step were added; one that does not count is forgotten."""
        if counts:
            self._totals += self._step
        self._step.zero_()

    def means_since_last_call(self) -> dict[str, float]:
        """``loss/source/<name>`` -> mean loss of its images on all processes; only of those that had some. A collective."""
        if not self.names:
            return {}
        sums, counts = comm.all_reduce_sum(self._totals).tolist()
        self._totals.zero_()
        return {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}
