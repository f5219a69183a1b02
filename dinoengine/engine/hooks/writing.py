"""When writers write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from dinoengine.engine.train_loop import HookBase
from dinoengine.utils.writers import EventWriter

logger = logging.getLogger(__name__)


class PeriodicWriter(HookBase):
    """Calls its writers every ``period`` iterations, at the last iteration and after training; always runs last.

    A writer that fails with an OSError ends no training: that is logged once, the writer tries again at the next turn, and
    what could not be written in the end is said in the end.
    """

    runs_last = True

    def __init__(self, writers: Sequence[EventWriter] | Callable[[], Sequence[EventWriter]], period: int = 20) -> None:
        """
        Args:
            writers: or a function that makes them when training starts (files are then opened for the right iteration).
            period: iterations.
        """
        self._make_writers = writers if callable(writers) else lambda: writers
        self.writers: list[EventWriter] = []
        self._failures: dict[EventWriter, int] = {}  # in a row
        self.period = period

    def before_train(self) -> None:
        self.writers = list(self._make_writers())

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            for writer in self.writers:
                self._attempt(writer, writer.write)

    def after_train(self) -> None:
        # What came after the last write: results of the final evaluation, or the last values before an error. A run that
        # failed in its first iteration has nothing to write, and leaves no trace of a run.
        has_values = self.trainer.succeeded or self.trainer.iter > self.trainer.start_iter
        for writer in self.writers:
            if has_values:
                self._attempt(writer, writer.write)
            self._attempt(writer, writer.close)
            if num := self._failures.get(writer):
                logger.error(
                    "%s: the last %d attempts to write failed, so its end is missing.", type(writer).__name__, num
                )

    def _attempt(self, writer: EventWriter, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            num = self._failures[writer] = self._failures.get(writer, 0) + 1
            if num == 1:
                logger.error(
                    "%s cannot write, and will try again: %s. The training goes on.", type(writer).__name__, error
                )
        else:
            if action == writer.write and (num := self._failures.pop(writer, 0)):
                logger.warning("%s writes again, after %d attempts that failed.", type(writer).__name__, num)
