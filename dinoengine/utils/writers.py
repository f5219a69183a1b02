"""Where metrics go: the console, metrics.json (JSON lines), TensorBoard."""

from __future__ import annotations

import abc
import datetime
import glob
import json
import logging
import math
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from dinoengine.utils.events import EventStorage, get_event_storage
from dinoengine.utils.file_writing import append_whole, atomic_write

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
# Rows of it that wait for a disk that is full; then the oldest are dropped.
MAX_UNWRITTEN_ROWS = 10_000
_COPIED_BYTES = 1 << 20
# What a write of TensorBoard events must find free; scalars of some hundred iterations.
MIN_ROOM_BYTES = 1 << 20


class EventWriter(abc.ABC):
    """Shows or stores what the ambient EventStorage has; called every LOG.PERIOD iterations and at the end.

    A ``write`` that raises OSError (a full disk, a folder that is gone) is tried again at the next call, so it must keep
    what it has not written.
    """

    @abc.abstractmethod
    def write(self) -> None:
        """Handle what came since the last call."""

    def close(self) -> None:
        """Release files."""


class JSONWriter(EventWriter):
    """One JSON object per line and iteration: ``{"iteration": 19, "lr": 0.001, ...}``, keys sorted.

    Losses and times are written as they were put, not smoothed. NaN and infinities become null, so every line is
    valid JSON. Opened on a file that has rows (a resumed run), it first drops those of iterations that will run
    again, so no iteration appears twice.
    """

    def __init__(self, path: str, start_iter: int = 0) -> None:
        """
        Args:
            path: of metrics.json.
            start_iter: first iteration of this run; older rows stay. Evaluation rows of a finished run, which stand
                at max_iter, are kept only while they are older than this.
        """
        self.path = path
        self._sequence = 0
        self._last_row: dict[str, Any] = {}
        # Last iteration in the file. A resumed storage gives its restored values again: those up to here are known.
        self.last_known = self._keep_rows_before(start_iter) if os.path.exists(path) else -1.0
        self._unwritten: deque[bytes] = deque(maxlen=MAX_UNWRITTEN_ROWS)
        self._append([])

    def _keep_rows_before(self, start_iter: int) -> float:
        """Drop the other rows; returns the last iteration of those kept. One row at a time: a file may have millions."""
        last_row, last_iteration = b"", -1.0
        num_same, is_same = 0, True  # bytes at the beginning that stay as they are: on a resume nearly all
        with open(self.path, "rb") as file:
            for row in file:
                iteration = _iteration_of(row)
                if iteration < start_iter:
                    last_row, last_iteration = row, max(last_iteration, iteration)
                # A crash may have taken the end of the last line, but not of the row.
                is_same = is_same and iteration < start_iter and row.endswith(b"\n")
                num_same += len(row) if is_same else 0
        self._last_row = json.loads(last_row) if last_row else {}
        if not is_same:
            with open(self.path, "rb") as file, atomic_write(self.path) as kept:
                while left := num_same - file.tell():
                    kept.write(file.read(min(left, _COPIED_BYTES)))
                kept.writelines(row.rstrip(b"\n") + b"\n" for row in file if _iteration_of(row) < start_iter)
        return last_iteration

    def write(self) -> None:
        updates, self._sequence = get_event_storage().updates_since(self._sequence)
        rows: dict[int, dict[str, float | int | None]] = {}
        for name, value, iteration in updates:
            # The last row may lack what the hooks behind the checkpoint had left undone, and this run has done.
            if iteration < self.last_known or (iteration == self.last_known and name in self._last_row):
                continue
            rows.setdefault(iteration, {})[name] = value if math.isfinite(value) else None
        if self.last_known in rows:
            rows[int(self.last_known)].update(self._last_row)
            self.last_known = self._keep_rows_before(int(self.last_known))
        for iteration in sorted(rows):
            row = {"iteration": iteration, **rows[iteration]}
            self._unwritten.append(json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n")
        self._append(self._unwritten)
        self._unwritten.clear()

    def _append(self, lines: Iterable[bytes]) -> None:
        """All lines or none. The file is opened each time, as it, or its folder, may have been removed since."""
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        append_whole(self.path, b"".join(lines))


def _iteration_of(line: bytes) -> float:
    """Iteration of a row; infinity for a line cut short by a crash, which is then dropped."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class ConsoleWriter(EventWriter):
    """One log line per write: progress, ETA, throughput, times, every loss term, schedules, gradient norm, memory.

    Losses, norms and times are medians over the window; ``time`` is seconds per iteration and ``data`` the part of it
    spent waiting for the loader. ``mem`` is the peak: of CUDA allocations on a GPU, of resident memory on the CPU.
    """

    def __init__(
        self, max_iter: int, *, images_per_iter: int = 0, window_size: int = 20, progress_bar: bool = False
    ) -> None:
        """
        Args:
            max_iter: end of the run, for the ETA.
            images_per_iter: global batch size, for images per second; 0 leaves it out.
            progress_bar: keep a bar under the log while standard output is a terminal.
        """
        self.max_iter = max_iter
        self.images_per_iter = images_per_iter
        self.window_size = window_size
        self._num_shown = 0
        self._bar: Any = None
        self._wants_bar = progress_bar and sys.stdout.isatty()

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter >= self.max_iter:  # after training there is nothing new but evaluation results
            return
        if (done := _iterations_done(storage)) == self._num_shown:  # a run that ended right after a line
            return
        self._num_shown = done
        self._update_bar(done)
        logger.info(self.line(storage))

    def line(self, storage: EventStorage) -> str:
        """The text of one line."""
        done = _iterations_done(storage)
        parts = [f"iter {done}/{self.max_iter}"]
        known = storage.latest()
        if "time" in known:
            seconds = storage.history("time").median(1000) * (self.max_iter - done)
            if math.isfinite(seconds):
                parts.append(f"eta {datetime.timedelta(seconds=int(seconds))}")
            step_time = storage.smoothed("time", self.window_size)
            if self.images_per_iter and step_time > 0:
                parts.append(f"img/s {self.images_per_iter / step_time:.0f}")
            parts.append(f"time {step_time:.4f}")
        if "data_time" in known:
            parts.append(f"data {storage.smoothed('data_time', self.window_size):.4f}")
        losses = sorted(storage.names("loss"), key=lambda name: name != "total_loss")
        smoothed = [*losses, *storage.names("metric")]
        parts += [f"{name} {storage.smoothed(name, self.window_size):.4g}" for name in smoothed]
        parts += [f"{name} {known[name][0]:.5g}" for name in storage.names("schedule")]
        parts.append(f"mem {peak_memory_mib():.0f}M")
        return "  ".join(parts)

    def _update_bar(self, iterations_done: int) -> None:
        if not self._wants_bar:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.max_iter, initial=iterations_done - 1, unit="it", dynamic_ncols=True, file=sys.stdout
            )
        self._bar.update(iterations_done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _iterations_done(storage: EventStorage) -> int:
    """Those that have losses: after a pause or an error the storage stands in an iteration that was not done."""
    known = storage.latest()
    return max((known[name][1] for name in storage.names("loss")), default=storage.iter) + 1


class TensorboardXWriter(EventWriter):
    """Scalars, images and histograms as TensorBoard events. No file appears before the first write."""

    def __init__(self, log_dir: str, start_iter: int = 0, last_known: float = math.inf) -> None:
        """
        Args:
            start_iter: where this run starts: what an earlier one wrote from there on is hidden, as it runs again.
            last_known: up to here an earlier one has written its scalars. Those it had measured and not yet written when
                it was killed are in the storage that was restored.
        """
        self.log_dir = log_dir
        self.start_iter = start_iter
        self.last_known = last_known
        self._sequence = 0
        self._writer: Any = None
        self._path = ""

    def write(self) -> None:
        self._require_room()
        storage = get_event_storage()
        is_first_after_resume = self._sequence < storage.restored_sequence
        first = max(self._sequence, storage.restored_sequence)
        updates, self._sequence = storage.updates_since(first)
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # It warns of each NaN, and does not say of what; the run has told what there is to tell.
            logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
            self._writer = SummaryWriter(self.log_dir, purge_step=self.start_iter or None)
            self._path = max(glob.glob(os.path.join(glob.escape(self.log_dir), "events.*")), key=os.path.getmtime)
        if is_first_after_resume:
            restored = storage.updates_since(0)[0][: -len(updates) or None]
            updates = [update for update in restored if update[2] > self.last_known] + updates
        for name, value, iteration in updates:
            self._writer.add_scalar(name, value, iteration)
        for image in storage.images_since(first):
            layout = "HW" if image.image.ndim == 2 else "HWC"
            self._writer.add_image(image.name, image.image, image.iteration, dataformats=layout)
        for histogram in storage.histograms_since(first):
            edges, counts = histogram.edges, histogram.counts
            centres = (edges[:-1] + edges[1:]) / 2
            self._writer.add_histogram_raw(
                histogram.name,
                min=edges[0],
                max=edges[-1],
                num=int(counts.sum()),
                sum=float((counts * centres).sum()),
                sum_squares=float((counts * centres**2).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=histogram.iteration,
            )
        self._writer.flush()

    def _require_room(self) -> None:
        """See that a file can be written before anything is handed over; let go of one that has been removed.

        A thread of the library writes. On a full disk it would end, and the training would wait for it for ever.
        """
        if self._writer is not None and not os.path.exists(self._path):
            self._writer.close()
            self._writer = None
        os.makedirs(self.log_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.log_dir) as probe:
            probe.write(bytes(MIN_ROOM_BYTES))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def peak_memory_mib() -> float:
    """Peak CUDA allocation of this process in MiB if CUDA is in use, else its peak resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
