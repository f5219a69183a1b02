"""When writers write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dinoengine.engine.train_loop import HookBase
from dinoengine.utils.writers import EventWriter


class PeriodicWriter(HookBase):
    """Calls its writers every ``period`` iterations, at the last iteration and after training; always runs last."""

    runs_last = True

    def __init__(self, writers: Sequence[EventWriter] | Callable[[], Sequence[EventWriter]], period: int = 20) -> None:
        """
        Args:
            writers: or a function that makes them when training starts (files are then opened for the right iteration).
            period: iterations.
        """
        self._make_writers = writers if callable(writers) else lambda: writers
        self.writers: list[EventWriter] = []
        self.period = period

    def before_train(self) -> None:
        self.writers = list(self._make_writers())

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            for writer in self.writers:
                writer.write()

    def after_train(self) -> None:
        # What came after the last write: results of the final evaluation, or the last values before an error. A run that
        # failed in its first iteration has nothing to write, and leaves no trace of a run.
        has_values = self.trainer.succeeded or self.trainer.iter > self.trainer.start_iter
        for writer in self.writers:
            if has_values:
                writer.write()
            writer.close()
