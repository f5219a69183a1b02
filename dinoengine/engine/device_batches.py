"""The batches of a training on its device, the next one on its way while a step computes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dinoengine.engine.fetching import BatchFetcher


@dataclass
class _Held:
    """The batch of an iteration that was fetched ahead, or the error that this ended in."""

    iteration: int
    batch: Any = None
    error: Exception | None = None
    copy: _Copy | None = None


@dataclass
class _Copy:
    """A copy on the side stream, and what tells how long the device had nothing to do meanwhile.

    Attributes:
        computed: on the stream of the step, behind everything it had queued.
        arrived: on the side stream, when the batch was in host memory.
        done: on the side stream, behind the copy.
        host_seconds: that the loader was waited for.
    """

    computed: Any
    arrived: Any
    done: Any
    host_seconds: float

    def finish(self) -> float:
        """Wait for the copy; seconds that the device had computed everything and the batch had not come."""
        self.done.synchronize()
        self.computed.synchronize()
        # Negative where the batch came while the device was still computing: nobody waited.
        return min(max(0.0, self.computed.elapsed_time(self.arrived) / 1000), self.host_seconds)


class DeviceBatches:
    """The batch of an iteration, on a device.

    On CUDA ``fetch_ahead``, called when a step has queued its work, takes the next batch from the loader and copies it on a
    stream of its own, so that both go on while the device computes. Elsewhere it does nothing. The batches, their order and
    the errors are the same either way: an error of the batch ahead is raised by the ``fetch`` of its iteration.

    A batch without ``record_stream`` (one of your own types) is copied when its step begins.
    """

    def __init__(self, data_loader: Iterable[Any], device: torch.device) -> None:
        self.fetcher = BatchFetcher(data_loader)
        self.device = device
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: _Held | None = None

    def fetch(self, iteration: int) -> tuple[Any, float]:
        """The batch of an iteration, and the seconds that training stood still for it.

        These are the time spent in here and, of the time that ``fetch_ahead`` waited for the loader, the part in which the
        device had run out of work.

        Args:
            iteration: one more than at the last call; the first one is where the loader starts.

        Raises:
            WorkerFailureError, RuntimeError: see ``BatchFetcher.fetch``.
        """
        start = time.perf_counter()
        held, self._held = self._held, None
        if held is None:
            batch = self.fetcher.fetch(iteration)
        else:
            assert held.iteration == iteration, f"fetched {held.iteration} ahead, asked for {iteration}"
            if held.error is not None:
                raise held.error
            batch = held.batch
        idle = 0.0
        if held is not None and held.copy is not None:
            idle = held.copy.finish()
            batch.record_stream(torch.cuda.current_stream(self.device))  # its memory is of the side stream
        elif hasattr(batch, "to"):
            batch = batch.to(self.device, non_blocking=True)
        return batch, time.perf_counter() - start + idle

    def fetch_ahead(self, iteration: int) -> None:
        """Have the batch of the next iteration ready when it is asked for; without a side stream nothing is done."""
        if self._side_stream is None:
            return
        computed = torch.cuda.Event(enable_timing=True)
        computed.record(torch.cuda.current_stream(self.device))
        start = time.perf_counter()
        try:
            batch = self.fetcher.fetch(iteration)
            host_seconds = time.perf_counter() - start
            held = _Held(iteration, batch)
            if hasattr(batch, "record_stream"):
                arrived, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
                with torch.cuda.stream(self._side_stream):
                    arrived.record()
                    held.batch = batch.to(self.device, non_blocking=True)
                    done.record()
                held.copy = _Copy(computed, arrived, done, host_seconds)
            self._held = held
        except Exception as error:  # of the next iteration: this one is not over
            self._held = _Held(iteration, error=error)

    def close(self) -> None:
        """End the workers and forget what was fetched ahead; the next ``fetch`` starts them anew at its iteration."""
        self._held = None
        self.fetcher.close()
