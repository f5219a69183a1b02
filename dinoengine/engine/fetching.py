"""Batches from a loader whose worker processes may die or hang."""

from __future__ import annotations

import logging
import multiprocessing
import re
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
# How torch begins the text of an error of its own; those of a worker's code begin with "Caught".
_WORKER_FAILURE = re.compile(r"DataLoader (worker \(pid|timed out)")


class WorkerFailureError(RuntimeError):
    """Data workers died or hung again and again."""


class BatchFetcher:
    """The batch of an iteration; starts the workers anew where one of them was killed or hangs.

    What a worker makes is a function of the position in the stream, and positions are functions of the iteration: nothing
    is lost or repeated. A loader that cannot start at an iteration (no ``batch_sampler.start_iter``) is not started anew.
    """

    def __init__(self, data_loader: Iterable[Any]) -> None:
        self.data_loader = data_loader
        self._iterator: Iterator[Any] | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._is_waiting = False

    def fetch(self, iteration: int) -> Any:
        """
        Args:
            iteration: one more than at the last call; the first one is where the loader starts.

        Raises:
            WorkerFailureError: when workers failed more than MAX_FAILURES times at this iteration.
            RuntimeError: if the loader ends.
        """
        for num_failures in range(1, MAX_FAILURES + 2):
            try:
                return self._next(iteration)
            except (RuntimeError, OSError, EOFError) as error:
                if not self._is_worker_failure(error):
                    raise
                what = self._describe(error)
            self._abandon()
            batch_sampler: Any = getattr(self.data_loader, "batch_sampler", None)
            if num_failures > MAX_FAILURES or not hasattr(batch_sampler, "start_iter"):
                break
            logger.warning(
                "%s in iteration %d. Starting the data workers anew at this iteration (%d of %d times).",
                what,
                iteration,
                num_failures,
                MAX_FAILURES,
            )
        raise WorkerFailureError(
            f"{what} in iteration {iteration}, {num_failures} time(s) in a row. The usual causes: the machine is out of "
            "memory (the kernel kills a worker: SIGKILL; lower DATALOADER.NUM_WORKERS or PREFETCH_FACTOR), /dev/shm is "
            "full (bus error, SIGBUS; in a container raise --shm-size), or a file system that does not answer "
            "(DATALOADER.TIMEOUT_SECONDS). --resume goes on from the last checkpoint."
        )

    def close(self) -> None:
        """End the workers; the next ``fetch`` starts them anew."""
        self._iterator = None
        self._workers = []

    def _next(self, iteration: int) -> Any:
        if self._iterator is None:
            batch_sampler: Any = getattr(self.data_loader, "batch_sampler", None)
            if hasattr(batch_sampler, "start_iter"):
                batch_sampler.start_iter = iteration
            before = set(multiprocessing.active_children())
            self._iterator = iter(self.data_loader)
            self._workers = [p for p in multiprocessing.active_children() if p not in before]
            self._watch_workers()
        self._is_waiting = True
        try:
            if self._dead():  # while nobody waited
                raise _WorkerDiedError
            return next(self._iterator)
        except StopIteration:
            raise RuntimeError(
                f"The training loader ended in iteration {iteration}; it must be endless (see PositionBatches)."
            ) from None
        finally:
            self._is_waiting = False

    def _watch_workers(self) -> None:
        """Notice a death at once while waiting for a batch, and at no other time.

        torch's own handler of SIGCHLD raises wherever the main thread happens to be, which may be within an optimizer
        step or while a checkpoint is written.
        """
        if not self._workers or threading.current_thread() is not threading.main_thread():
            return  # then torch looks after its workers every five seconds
        reference = weakref.ref(self)

        def raise_while_waiting(number: int, frame: FrameType | None) -> None:
            fetcher = reference()
            if fetcher is not None and fetcher._is_waiting and fetcher._dead():
                raise _WorkerDiedError

        signal.signal(signal.SIGCHLD, raise_while_waiting)

    def _dead(self) -> list[multiprocessing.process.BaseProcess]:
        return [worker for worker in self._workers if not worker.is_alive()]

    def _is_worker_failure(self, error: Exception) -> bool:
        if isinstance(error, _WorkerDiedError) or _WORKER_FAILURE.match(str(error)):
            return True
        # A worker that dies while it hands over a tensor breaks the connection a moment before it is gone. Errors of a
        # worker's code are of the same types; they say so.
        is_connection = isinstance(error, OSError | EOFError) and not str(error).startswith("Caught")
        return is_connection and bool(wait([worker.sentinel for worker in self._workers], timeout=1))

    def _describe(self, error: Exception) -> str:
        for ready in wait([worker.sentinel for worker in self._workers], timeout=0):
            # Its end is seen a moment before its exit code is there.
            next(worker for worker in self._workers if worker.sentinel == ready).join(timeout=1)
        if dead := self._dead():
            return "; ".join(f"Data worker {w.pid} was ended by {_cause(w.exitcode)}" for w in dead)
        return str(error)  # of torch: timed out

    def _abandon(self) -> None:
        """Kill what is left of the workers and let go of the iterator.

        In a thread: torch takes locks that they share, and one that a killed worker held is never released.
        """
        for worker in self._workers:
            worker.kill()
        last_reference = [self._iterator]
        self.close()
        threading.Thread(target=last_reference.clear, daemon=True).start()


class _WorkerDiedError(RuntimeError):
    pass


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
