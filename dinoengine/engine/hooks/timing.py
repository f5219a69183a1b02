"""How long things take."""

from __future__ import annotations

import datetime
import logging
import time

from dinoengine.engine.train_loop import HookBase

logger = logging.getLogger(__name__)


class IterationTimer(HookBase):
    """Puts ``time``, seconds per iteration, and logs the overall speed at the end.

    Register it behind hooks whose work belongs to a step (the EMA) and before the rest.

    Time of the other hooks (checkpoints, evaluation) is not part of ``time``; it is reported at the end. The first
    iterations of a run (allocations, worker start) are left out.
    """

    def __init__(self, warmup_iters: int = 3) -> None:
        self.warmup_iters = warmup_iters
        self._train_start = 0.0
        self._step_start = 0.0
        self._warmup_seconds = 0.0
        self._step_seconds = 0.0
        self._num_steps = 0

    def before_train(self) -> None:
        self._train_start = time.perf_counter()
        self._warmup_seconds = self._step_seconds = 0.0
        self._num_steps = 0

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        if self.trainer.iter - self.trainer.start_iter + 1 >= self.warmup_iters:
            self._step_seconds += seconds
            self._num_steps += 1
            self.trainer.storage.put_scalar("time", seconds)
        else:
            self._warmup_seconds += seconds

    def after_train(self) -> None:
        total = time.perf_counter() - self._train_start
        if self._num_steps:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                self._num_steps,
                datetime.timedelta(seconds=int(self._step_seconds)),
                self._step_seconds / self._num_steps,
            )
        others = datetime.timedelta(seconds=int(max(0.0, total - self._step_seconds - self._warmup_seconds)))
        logger.info("Total training time: %s (%s on hooks)", datetime.timedelta(seconds=int(total)), others)
