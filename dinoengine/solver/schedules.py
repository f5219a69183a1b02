"""Schedules as pure functions of the iteration: nothing to save, nothing to restore.

The formulas are those of the published DINOv2 training (arXiv:2304.07193). Iterations count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class CosineSchedule:
    """Freeze at 0, linear warm-up, then a half cosine from ``base`` to ``final``.

    value(i) = 0                                                      for i < freeze_iters
             = linspace(start, base, warmup_iters)[i - freeze_iters]  in the warm-up (its last value is ``base``)
             = final + (base - final) (1 + cos(pi k / n)) / 2         k = i - freeze - warmup, n = total - freeze - warmup
             = final                                                  for i >= total_iters

    A warm-up longer than the run is cut by its end.
    """

    base: float
    final: float
    total_iters: int
    warmup_iters: int = 0
    freeze_iters: int = 0
    start: float = 0.0

    def __call__(self, iteration: int) -> float:
        if iteration >= self.total_iters:
            return self.final
        if iteration < self.freeze_iters:
            return 0.0
        step = iteration - self.freeze_iters
        if step < self.warmup_iters:
            return _linspace(self.start, self.base, self.warmup_iters, step)
        step -= self.warmup_iters
        length = self.total_iters - self.freeze_iters - self.warmup_iters
        return self.final + 0.5 * (self.base - self.final) * (1.0 + math.cos(math.pi * step / length))


@dataclass(frozen=True)
class LinearWarmupSchedule:
    """linspace(start, final, warmup_iters), then ``final`` for ever; it does not depend on the length of the run."""

    start: float
    final: float
    warmup_iters: int

    def __call__(self, iteration: int) -> float:
        if iteration >= self.warmup_iters:
            return self.final
        return _linspace(self.start, self.final, self.warmup_iters, iteration)


@dataclass(frozen=True)
class FrozenStart:
    """Another schedule whose first ``freeze_iters`` values are 0 (not shifted: it then continues where it would be)."""

    schedule: Schedule
    freeze_iters: int

    def __call__(self, iteration: int) -> float:
        return 0.0 if iteration < self.freeze_iters else self.schedule(iteration)


@dataclass(frozen=True)
class RampAfterFreeze:
    """A factor: 0 for ``freeze_iters``, then 1 / n, 2 / n ... 1 over ``ramp_iters`` = n iterations, then 1."""

    freeze_iters: int
    ramp_iters: int

    def __call__(self, iteration: int) -> float:
        step = iteration - self.freeze_iters + 1
        if step <= 0:
            return 0.0
        return min(1.0, step / self.ramp_iters) if self.ramp_iters else 1.0


def _linspace(start: float, stop: float, num: int, index: int) -> float:
    """Element ``index`` of numpy.linspace(start, stop, num): both ends included."""
    return start if num == 1 else start + (stop - start) * index / (num - 1)
