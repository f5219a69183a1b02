"""When to save."""

from __future__ import annotations

import json
import logging
import math
import os

from dinoengine.checkpoint import Checkpointer, periodic_checkpoints
from dinoengine.engine.train_loop import HookBase
from dinoengine.utils import comm
from dinoengine.utils.file_io import atomic_write

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(HookBase):
    """``model_0000999.pth`` when 1000 iterations are done, and so on; ``model_final.pth`` at the end.

    Register it on every rank: rank 0 writes, but all of them bring the metrics of the last iterations together.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, max_to_keep: int = 0) -> None:
        """
        Args:
            period: iterations; 0 saves only at the end.
            max_to_keep: periodic files kept, the newest; 0 keeps all. What counts is the folder, so it holds across
                resumes. Files of later iterations, left behind by a run that went back to an earlier checkpoint, count
                as the oldest. model_final and model_best are not touched.
        """
        self.checkpointer = checkpointer
        self.period = period
        self.max_to_keep = max_to_keep

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period and done % self.period == 0:
            self._save(f"model_{self.trainer.iter:07d}")
            if self.max_to_keep and comm.is_main_process():
                self._remove_old()
        if done >= self.trainer.max_iter:
            self._save("model_final")

    def _remove_old(self) -> None:
        by_iteration = periodic_checkpoints(self.checkpointer.save_dir)
        left_behind = [path for iteration, path in by_iteration.items() if iteration > self.trainer.iter]
        of_this_run = [path for iteration, path in by_iteration.items() if iteration <= self.trainer.iter]
        for path in (left_behind + of_this_run)[: -self.max_to_keep]:
            os.remove(path)

    def _save(self, name: str) -> None:
        self.trainer.flush_metrics()  # the metric history in the checkpoint then reaches its iteration
        self.checkpointer.save(name, iteration=self.trainer.iter)


class BestCheckpointer(HookBase):
    """``model_best.pth`` whenever a metric is better than ever before; resuming still continues from the last.

    The best value lives in ``model_best.json`` beside the file, so it survives resuming. NaN and infinities are never
    best. Register it after the EvalHook.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, mode: str = "max") -> None:
        """
        Args:
            metric: name in the storage, e.g. "knn/top1_k20".
            mode: "max" or "min".

        Raises:
            ValueError: for another mode.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}.")
        self.checkpointer = checkpointer
        self.metric = metric
        self.mode = mode
        self._seen_iteration = -1
        self._is_warned = False

    def before_train(self) -> None:
        # After a resume the storage holds old values: they were judged when they were measured.
        self._seen_iteration = self._latest()[1]

    @property
    def _record_path(self) -> str:
        return os.path.join(self.checkpointer.save_dir, "model_best.json")

    def best(self) -> tuple[float, int] | None:
        """(value, iteration) of the best of this metric so far, or None."""
        if not os.path.exists(self._record_path):
            return None
        with open(self._record_path, encoding="utf-8") as file:
            record = json.load(file)
        return (record["value"], record["iteration"]) if record["metric"] == self.metric else None

    def _latest(self) -> tuple[float, int]:
        return self.trainer.storage.latest().get(self.metric, (math.nan, -1))

    def after_step(self) -> None:
        self._check()

    def after_train(self) -> None:
        if self.trainer.succeeded:
            self._check()

    def _check(self) -> None:
        measured = self.trainer.storage.names("eval")
        if measured and self.metric not in measured and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "TEST.BEST_METRIC %s is not measured, so there is no best checkpoint. There are: %s.",
                self.metric,
                ", ".join(measured),
            )
        value, iteration = self._latest()
        if iteration == self._seen_iteration:
            return
        self._seen_iteration = iteration
        if not math.isfinite(value):
            logger.warning("%s is %s at iteration %d: not a candidate for the best.", self.metric, value, iteration)
            return
        best = self.best()
        if best is not None and (value <= best[0] if self.mode == "max" else value >= best[0]):
            return
        before = "" if best is None else f", before {best[0]:.4f} at iteration {best[1]}"
        logger.info("Best %s so far: %.4f at iteration %d%s.", self.metric, value, iteration, before)
        last_finished = min(self.trainer.iter, self.trainer.max_iter - 1)
        self.checkpointer.save("model_best", tag_last=False, iteration=last_finished)
        with atomic_write(self._record_path, "w") as file:
            json.dump({"metric": self.metric, "value": value, "iteration": iteration}, file)
