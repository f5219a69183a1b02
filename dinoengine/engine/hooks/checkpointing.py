"""When to save, and when what is saved has stopped getting better."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable

from dinoengine.checkpoint import Checkpointer, periodic_checkpoints
from dinoengine.checkpoint.resuming import BEST, FINAL, checkpoint_name
from dinoengine.checkpoint.retention import to_remove
from dinoengine.checkpoint.sharded import remove_checkpoint
from dinoengine.config import ConfigError
from dinoengine.engine.train_loop import HookBase, TrainerBase
from dinoengine.utils import comm
from dinoengine.utils.file_writing import write_json

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(HookBase):
    """``model_0000999.pth`` when 1000 iterations are done, and so on; ``model_final.pth`` at the end, early or not.

    Register it on every rank: rank 0 writes, but all of them bring the metrics of the last iterations together, and an
    error is one of all of them.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_to_keep: int = 0,
        *,
        keep_every: int = 0,
        minutes: float = 0.0,
        check_period: int = 1,
        background: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            period: iterations; 0 saves only at the end.
            max_to_keep: periodic files kept, the newest; 0 keeps all. What counts is the folder, so it holds across
                resumes. Files of later iterations, left behind by a run that went back to an earlier checkpoint, count
                as the oldest. model_final and model_best are not touched.
            keep_every: files in which a multiple of this number of iterations is done are kept beside those; 0: none.
            minutes: save also when this much time has passed since the last save, whatever became of it; 0: never.
            check_period: iterations between looks at the clock of rank 0, which decides for all.
            background: write while training goes on. The last one of a run is waited for.
            clock: seconds; must not jump.
        """
        self.checkpointer = checkpointer
        self.period = period
        self.max_to_keep = max_to_keep
        self.keep_every = keep_every
        self.minutes = minutes
        self.check_period = check_period
        self.background = background
        self._clock = clock
        self._last_time = 0.0
        self._num_saved = 0  # iterations that were done at the last save

    @property
    def is_saved(self) -> bool:
        """Whether the step that has just been done is in a checkpoint, on disk: one that is still being written in the
        background does not count."""
        return self._num_saved == self.trainer.iter + 1

    def before_train(self) -> None:
        self._last_time = self._clock()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_end = done >= self.trainer.max_iter
        if (self.period and done % self.period == 0) or (not is_end and self._time_is_up(done)):
            self._save(checkpoint_name(self.trainer.iter), then=self._remove_old_after(self.trainer.iter))
        if is_end:
            self._save_final()

    def after_train(self) -> None:
        if self.trainer.paused and self._num_saved != self.trainer.iter:
            # Collective: a process that ended before rank 0 has saved would end that one as well.
            self._save(checkpoint_name(_last_finished(self.trainer)), required=True)
        elif not self.trainer.succeeded:
            self.checkpointer.settle()
        elif self.trainer.iter < self.trainer.max_iter:  # stopped by a hook behind this one
            self._save_final()

    def _time_is_up(self, done: int) -> bool:
        # All processes ask in the same iterations; what their clocks say does not matter.
        if not self.minutes or done % self.check_period:
            return False
        return bool(comm.broadcast_object(self._clock() - self._last_time >= 60 * self.minutes))

    def _remove_old_after(self, iteration: int) -> Callable[[], None]:
        """What the thread that has written the file of ``iteration`` does next."""

        def remove_old() -> None:
            paths = periodic_checkpoints(self.checkpointer.save_dir)
            for old in to_remove(paths, current=iteration, max_to_keep=self.max_to_keep, keep_every=self.keep_every):
                try:
                    remove_checkpoint(paths[old])
                except OSError as error:
                    logger.warning("%s could not be deleted: %s.", paths[old], error.strerror)

        return remove_old

    def _save_final(self) -> None:
        self._save(FINAL, required=True)
        if self.checkpointer.num_failed:
            logger.warning("%d checkpoint(s) of this run could not be written.", self.checkpointer.num_failed)

    def _save(self, name: str, *, required: bool = False, then: Callable[[], None] | None = None) -> None:
        self.trainer.flush_metrics()  # the metric history in the checkpoint then reaches its iteration
        iteration = _last_finished(self.trainer)
        in_background = self.background and not required
        path = self.checkpointer.save(name, required=required, background=in_background, then=then, iteration=iteration)
        self._last_time = self._clock()
        if path and not in_background:
            self._num_saved = iteration + 1


def _last_finished(trainer: TrainerBase) -> int:
    """Index of the last iteration that is done, in ``after_step`` as in ``after_train`` of a run that ended well."""
    return trainer.iter - 1 if trainer.succeeded or trainer.paused else trainer.iter


class BestCheckpointer(HookBase):
    """``model_best.pth`` whenever a metric is better than ever before; resuming still continues from the last.

    The best value lives in ``model_best.json`` beside the file, so it survives resuming. NaN and infinities are never
    best. It is written before training goes on: what comes next may ask for the best. Register it after the EvalHook, on
    all processes; the first of them writes.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, mode: str = "max") -> None:
        """
        Args:
            metric: name in the storage, e.g. "knn/top1_k20".
            mode: "max" (higher is better) or "min".

        Raises:
            ValueError: for another mode.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}.")
        self.checkpointer = checkpointer
        self.metric = metric
        self.mode = mode
        self._seen_iteration = -1

    def before_train(self) -> None:
        # After a resume the storage holds old values: they were judged when they were measured.
        self._seen_iteration = self._latest()[1]

    @property
    def _record_path(self) -> str:
        return os.path.join(self.checkpointer.save_dir, f"{BEST}.json")

    def best(self) -> tuple[float, int] | None:
        """(value, iteration) of the best of this metric, in this mode, so far, or None."""
        if not os.path.exists(self._record_path):
            return None
        try:
            with open(self._record_path, encoding="utf-8") as file:
                record = json.load(file)
            is_same = (record["metric"], record.get("mode", "max")) == (self.metric, self.mode)
            return (float(record["value"]), int(record["iteration"])) if is_same else None
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged; what was best before this is not known any more.", self._record_path)
            return None

    def _latest(self) -> tuple[float, int]:
        return self.trainer.storage.latest().get(self.metric, (math.nan, -1))

    def catch_up(self) -> None:
        self._check()

    def after_step(self) -> None:
        self._check()

    def after_train(self) -> None:
        if self.trainer.succeeded:
            self._check()

    def _check(self) -> None:
        measured = self.trainer.storage.names("eval")
        if measured and self.metric not in measured:
            problem = f"{self.metric!r} is not measured. There are: {', '.join(measured)}."
            raise ConfigError("TEST.BEST_METRIC", [problem])
        value, iteration = self._latest()
        if iteration == self._seen_iteration:
            return
        self._seen_iteration = iteration
        if not comm.on_main_process(lambda: self._is_best(value, iteration)):
            return

        def record() -> None:
            best = {"metric": self.metric, "mode": self.mode, "value": value, "iteration": iteration}
            write_json(self._record_path, best, indent=None)

        self.checkpointer.save(BEST, tag_last=False, then=record, iteration=_last_finished(self.trainer))

    def _is_best(self, value: float, iteration: int) -> bool:
        if not math.isfinite(value):
            logger.warning("%s is %s at iteration %d: not a candidate for the best.", self.metric, value, iteration)
            return False
        best = self.best()
        if best is not None and (value <= best[0] if self.mode == "max" else value >= best[0]):
            return False
        before = "" if best is None else f", before {best[0]:.4f} at iteration {best[1]}"
        logger.info("Best %s so far: %.4f at iteration %d%s.", self.metric, value, iteration, before)
        return True


class EarlyStopping(HookBase):
    """Ends the run when a number of periodic evaluations in a row were no better than the best before them.

    It counts from the iteration of the best, which is in ``model_best.json``: nothing to restore, and a run that is
    resumed at any iteration stops where it would have stopped. Register it after the BestCheckpointer, on all processes.
    """

    def __init__(self, best: BestCheckpointer, period: int, patience: int) -> None:
        """
        Args:
            best: knows the metric and its best value.
            period: iterations between evaluations, > 0.
            patience: evaluations, > 0.
        """
        self.best = best
        self.period = period
        self.patience = patience

    def catch_up(self) -> None:
        self.after_step()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 and done != self.trainer.max_iter and (reason := self.reason_to_stop(done - 1)):
            self.trainer.request_stop(reason)

    def reason_to_stop(self, iteration: int) -> str:
        """Why there is nothing to do after ``iteration`` is done; empty: there is. A collective operation."""
        # The processes may not share a disk. Without a best of this metric (it is new, or was never finite) the run counts.
        best = comm.on_main_process(self.best.best)
        since = self.trainer.start_iter - 1 if best is None else best[1]
        # Evaluations between the two; a run may be resumed, and this be asked, in between evaluations.
        num_evaluations = (iteration + 1) // self.period - (since + 1) // self.period
        if num_evaluations < self.patience:
            return ""
        what = "a finite value" if best is None else f"better than {best[0]:.4f} at iteration {best[1]}"
        return (
            f"no {self.best.metric} {what} in {num_evaluations} evaluation(s), and TEST.EARLY_STOPPING_PATIENCE is "
            f"{self.patience}."
        )
