"""Hooks that set something as a function of the iteration, before each step, and log the value that was used."""

from __future__ import annotations

from collections.abc import Callable

from dinoengine.engine.train_loop import HookBase
from dinoengine.solver import OptimizerSchedule, Schedule


class LRScheduler(HookBase):
    """Applies an OptimizerSchedule: learning rate, weight decay, last-layer learning rate (its freeze included)."""

    def __init__(self, scheduler: OptimizerSchedule) -> None:
        self.scheduler = scheduler

    def before_step(self) -> None:
        values = self.scheduler.apply(self.trainer.iter)
        self.trainer.storage.put_scalars(values, smoothing_hint=False, role="schedule")


class ParamSchedule(HookBase):
    """Any scheduled value: ``setter(schedule(iteration))``, e.g. the teacher temperature."""

    def __init__(self, scalar_name: str, schedule: Schedule, setter: Callable[[float], None]) -> None:
        """
        Args:
            scalar_name: under which the value is logged.
        """
        self.scalar_name = scalar_name
        self.schedule = schedule
        self.setter = setter

    def before_step(self) -> None:
        value = self.schedule(self.trainer.iter)
        self.setter(value)
        self.trainer.storage.put_scalar(self.scalar_name, value, smoothing_hint=False, role="schedule")
