"""The teacher follows the student."""

from __future__ import annotations

from typing import Protocol

from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.solver import Schedule


class HasTeacher(Protocol):
    def update_teacher(self, momentum: float) -> None: ...


class EMATeacher(HookBase):
    """After each optimizer step: teacher = m * teacher + (1 - m) * student, m a schedule.

    A step that was skipped (non-finite, or an fp16 overflow) moves nothing. Register it before the checkpointer, so
    that a checkpoint holds the teacher of its iteration.
    """

    trainer: SimpleTrainer

    def __init__(self, model: HasTeacher, momentum: Schedule) -> None:
        """
        Args:
            model: not wrapped in DDP.
        """
        self.model = model
        self.momentum = momentum

    def after_step(self) -> None:
        momentum = self.momentum(self.trainer.iter)
        if not self.trainer.step_skipped:
            self.model.update_teacher(momentum)
        self.trainer.storage.put_scalar("teacher_momentum", momentum, smoothing_hint=False, role="schedule")
