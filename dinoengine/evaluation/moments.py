"""Mean and covariance of more rows than fit into memory, spread over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from dinoengine.utils import comm


class Moments:
    """Number, mean and scatter of rows, in float64; memory does not depend on how many rows there are.

    Parts are joined about their means (Chan, Golub and LeVeque 1983), so a large mean costs no digits of the scatter:
    rows that are all the same have scatter 0, not what a difference of two large sums leaves.

    Attributes:
        count: rows seen.
        mean: [D].
        scatter: [D, D], sum over rows of the outer product of (row - mean) with itself; its diagonal [D] if asked for.
    """

    def __init__(self, device: torch.device | str = "cpu", *, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64, device=device)
        self.scatter = self._zero_scatter(0)

    def _zero_scatter(self, dim: int) -> Tensor:
        return self.mean.new_zeros((dim,) if self.diagonal else (dim, dim))

    def _scatter_about_0(self, rows: Tensor) -> Tensor:
        return rows.square().sum(0) if self.diagonal else rows.T @ rows

    def add(self, rows: Tensor) -> None:
        """[B, D], any float dtype; B may be 0."""
        if not len(rows):
            return
        rows = rows.to(self.mean.device, torch.float64)
        if not self.count:
            self.mean = self.mean.new_zeros(rows.shape[1])
            self.scatter = self._zero_scatter(rows.shape[1])
        mean = rows.mean(0)
        delta = mean - self.mean
        total = self.count + len(rows)
        between = self._scatter_about_0(delta[None]) * (self.count * len(rows) / total)
        self.scatter = self.scatter + self._scatter_about_0(rows - mean) + between
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def of_all_processes(self) -> Moments:
        """Those of the rows of all processes, the same on each; a collective operation. Some may have seen no row."""
        shapes = comm.all_gather((self.count, len(self.mean)))
        dim = max(d for _, d in shapes)
        mean = self.mean if self.count else self.mean.new_zeros(dim)
        scatter = self.scatter if self.count else self._zero_scatter(dim)
        joined = Moments(self.mean.device, diagonal=self.diagonal)
        joined.count = sum(count for count, _ in shapes)
        joined.mean = comm.all_reduce_sum(mean * self.count) / joined.count
        between = self._scatter_about_0((mean - joined.mean)[None]) * self.count
        joined.scatter = comm.all_reduce_sum(scatter + between)
        return joined

    def covariance(self) -> Tensor:
        """Of the population (divided by ``count``): [D, D], or the variances [D]."""
        return self.scatter / self.count

    def gram(self) -> Tensor:
        """Sum over rows of the outer product of the row with itself, not centred: [D, D], or its diagonal [D]."""
        return self.scatter + self._scatter_about_0(self.mean[None]) * self.count
