"""The loss of each dataset of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinoengine.utils import comm

_PREFIX = "loss/source/"


class SourceLosses:
    """Sums the losses of images by the dataset that each is from, on the device: nothing waits for it between two readings.

    The mean over images of what each adds is the objective. So the means of the sources, weighted with how many images were
    from each, add up to the mean ``total_loss`` of the same iterations. Sums are taken step by step, whenever they are
    gathered: a run that was paused has the same to the bit.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """
        Args:
            names: of the datasets, in their order; those of one name are told apart by a number. Empty: nothing is summed.
        """
        self.names = [_PREFIX + (name if names[:i].count(name) == 0 else f"{name} {i}") for i, name in enumerate(names)]
        # [2, names]: sums, and numbers of images.
        self._step = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self._pending: list[Tensor] = []  # those of this process, a step each
        # Those of all processes, gathered and not yet taken.
        self._totals = torch.zeros(2, len(names), dtype=torch.float64)

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
        """Called when all parts of a step were added; one that does not count, on all processes, is forgotten."""
        if self.names and counts:
            self._pending.append(self._step.clone())
        self._step.zero_()

    def gather(self) -> None:
        """Bring the steps since the last call together from all processes; a collective."""
        if not self._pending:
            return
        steps, self._pending = comm.all_reduce_sum(torch.stack(self._pending)), []
        for step in steps.cpu():
            self._totals += step

    def take_means(self) -> dict[str, float]:
        """``loss/source/<name>`` -> mean loss of its images since the last call, as far as gathered; of those with any."""
        sums, counts = self._totals.tolist()
        self._totals.zero_()
        return {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}

    def state_dict(self) -> dict[str, Any]:
        """What was gathered and not taken, by name. Gather first."""
        return {name: totals.tolist() for name, totals in zip(self.names, self._totals.T, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, name in enumerate(self.names):
            self._totals[:, i] = torch.tensor(state.get(name, (0.0, 0.0)), dtype=torch.float64)
