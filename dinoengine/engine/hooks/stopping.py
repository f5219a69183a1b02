"""Ending a run before its last iteration, so that it can be resumed: signals and a time budget."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import time
from types import FrameType
from typing import Any

from dinoengine.engine.hooks.checkpointing import PeriodicCheckpointer
from dinoengine.engine.hooks.evaluation import EvaluationInterrupted
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.utils import comm
from dinoengine.utils.stop_signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds of e.g. "11h50m", "90m", "1d2h" or "45s".

    Raises:
        ValueError: for anything else.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration; expected numbers with units d, h, m, s, e.g. 11h50m, 90m or 45s.")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class StopOnSignal(HookBase):
    """Pauses the run at SIGTERM, SIGINT or SIGUSR1, on all processes in the same iteration, whichever of them got it.

    A second signal ends the process at once, as if there were no hook. In a long evaluation the run leaves it, unless
    other processes would wait for a state that is not on disk: then the evaluation is finished first.

    Python takes signals in the main thread; elsewhere (a notebook server's thread) the hook does nothing.
    """

    trainer: SimpleTrainer
    runs_last = True  # handlers stay until the final evaluation of ``after_train`` is over
    sees_weights_before_step = False

    def __init__(self, checkpointer: PeriodicCheckpointer) -> None:
        """
        Args:
            checkpointer: saves the run when it pauses.
        """
        self.checkpointer = checkpointer
        self._received = ""
        self._handlers_before: dict[int, Any] = {}

    def before_train(self) -> None:
        self._received = ""
        self.trainer.flags["signal"] = False
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def before_optimizer_step(self) -> None:
        # The first moment after the processes have agreed, and before the hooks that save or evaluate. A signal that comes
        # later in this step is agreed upon in the next one.
        if self.trainer.agreed_flags["signal"]:
            self.trainer.request_pause(f"{self._received or 'a signal to another process'}.")

    def after_train(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = f"received {signal.Signals(number).name}"
        self.trainer.flags["signal"] = True
        # Not through logging: a handler may run while the log's own lock or buffer is in use.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self._received}: saving after this iteration; send it again to end at once.\n".encode())
        trainer = self.trainer
        if trainer.is_evaluating and (not comm.is_distributed() or self.checkpointer.is_saved or trainer.succeeded):
            raise EvaluationInterrupted(self._received)


class TimeBudget(HookBase):
    """Pauses the run so that it has ended by a deadline.

    An iteration is the last if another one would come too close to the deadline, each as long as the longest so far, with
    what hooks did in it (evaluation, checkpoint), and half of that left to save.
    """

    trainer: SimpleTrainer

    sees_weights_before_step = False

    def __init__(self, deadline: float, what: str = "the time budget") -> None:
        """
        Args:
            deadline: of ``time.monotonic()``, in seconds.
            what: it is called in the log.
        """
        self.deadline = deadline
        self.what = what
        self._longest = 0.0
        self._last = 0.0

    def before_train(self) -> None:
        self.trainer.flags["time_budget"] = False
        self._last = time.monotonic()

    def before_step(self) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        # Every process has a clock; the first of them that sees the end decides for all.
        self.trainer.flags["time_budget"] = now + 2.5 * self._longest > self.deadline

    def before_optimizer_step(self) -> None:
        if self.trainer.agreed_flags["time_budget"]:
            self.trainer.request_pause(f"{self.what} is used up.")
