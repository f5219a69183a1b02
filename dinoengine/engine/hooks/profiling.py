"""Where the time and the memory go."""

from __future__ import annotations

import logging
import os
from typing import Any

from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.utils.startup import StartupTimes

logger = logging.getLogger(__name__)


class StartupReport(HookBase):
    """Logs once, behind the first iteration, how long it took to get there and what the time went into.

    Register it as the first hook: what other hooks do before the training is then a part of its own ("hooks"), and their
    work after the first step none. "batch" is the wait for the first batch (starting the workers, loading), "step" the rest
    of the first step.
    """

    trainer: SimpleTrainer

    def __init__(self, times: StartupTimes) -> None:
        """
        Args:
            times: of what came before the training.
        """
        self._times: StartupTimes | None = times

    def before_step(self) -> None:
        if self._times is not None:
            self._times.mark("hooks")

    def after_step(self) -> None:
        if self._times is None:
            return
        self._times.mark("step")
        self._times.split_off("step", "batch", self.trainer.data_time)
        logger.info("First iteration after %s.", self._times.line())
        self._times = None


class TorchProfiler(HookBase):
    """Records a trace of some iterations into ``<output_dir>/profile`` and logs the ten costliest operations.

    Open the trace (.json) in chrome://tracing or ui.perfetto.dev.
    """

    def __init__(self, start_iter: int, end_iter: int, output_dir: str) -> None:
        """
        Args:
            start_iter, end_iter: iterations ``start_iter .. end_iter - 1`` are recorded.
        """
        self.start_iter = start_iter
        self.end_iter = end_iter
        self.folder = os.path.join(output_dir, "profile")
        self._profiler: Any = None
        self._on_cuda = False

    def before_step(self) -> None:
        if self.trainer.iter != self.start_iter:
            return
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        self._on_cuda = torch.cuda.is_available()
        if self._on_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def after_step(self) -> None:
        if self._profiler is not None and self.trainer.iter + 1 >= self.end_iter:
            self._finish()

    def after_train(self) -> None:
        if self._profiler is not None:
            self._finish()

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"iter{self.start_iter}-{self.trainer.iter}.trace.json")
        profiler.export_chrome_trace(path)
        # Of launches on the host nothing can be learnt about the device.
        order = "self_cuda_time_total" if self._on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=50)
        logger.info("Profiler trace in %s\n%s", path, table)
