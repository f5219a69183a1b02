"""Metrics from anywhere, without plumbing: the ambient EventStorage of a running training.

with EventStorage(start_iter) as storage:
    ...
    get_event_storage().put_scalar("teacher_entropy", 3.2)
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor

# Long enough for the ETA (median of the last 1000 times), short enough that memory does not grow with the run.
HISTORY_LENGTH = 1024
ROLES = ("", "loss", "schedule", "metric", "eval")

_storages: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """The innermost storage that is open.

    Raises:
        RuntimeError: outside of ``with EventStorage(...)``.
    """
    if not _storages:
        raise RuntimeError("No EventStorage is open: call this inside a training step or `with EventStorage(0):`.")
    return _storages[-1]


def has_event_storage() -> bool:
    return bool(_storages)


class Image(NamedTuple):
    """An image put into the storage: [H, W, C] uint8 and where it belongs."""

    sequence: int
    name: str
    image: np.ndarray
    iteration: int


class Histogram(NamedTuple):
    """Bin counts and edges of a tensor put into the storage."""

    sequence: int
    name: str
    counts: np.ndarray
    edges: np.ndarray
    iteration: int


class EventStorage:
    """Scalars by name with a bounded history, and the last few images and histograms.

    Every scalar has a role, which writers use to choose and order what they show: "loss" (optimised), "schedule"
    (set by a hook), "metric" (measured in the step), "eval" (results), or "" (anything else). A name keeps the role
    and the smoothing hint it was first put with.

    Writers read ``updates_since(sequence)``: each put scalar in order, with its own iteration, so that nothing is
    lost when several values arrive late or writers have different periods.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = {}
        self._smoothing_hint: dict[str, bool] = {}
        self._role: dict[str, str] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        # Bounded, so a storage without a writer does not grow. 2**16 scalars are thousands of iterations.
        self._updates: deque[tuple[int, str, float, int]] = deque(maxlen=2**16)
        self._images: deque[Image] = deque(maxlen=64)
        self._histograms: deque[Histogram] = deque(maxlen=64)
        self._sequence = 0
        self.restored_sequence = 0
        self._prefix = ""

    def put_scalar(
        self, name: str, value: float, *, smoothing_hint: bool = True, cur_iter: int | None = None, role: str = ""
    ) -> None:
        """Record ``value`` for ``cur_iter`` (default: the current iteration).

        Raises:
            ValueError: for an unknown role, or a name that was put with another role or hint before.
        """
        if role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}; got {role!r} for {name!r}.")
        name = self._prefix + name
        value = float(value)
        known = (self._role.setdefault(name, role), self._smoothing_hint.setdefault(name, smoothing_hint))
        if known != (role, smoothing_hint):
            raise ValueError(
                f"Scalar {name!r} was put with role={known[0]!r}, smoothing_hint={known[1]} before; got role={role!r}, "
                f"smoothing_hint={smoothing_hint}. Use another name."
            )
        iteration = self.iter if cur_iter is None else cur_iter
        self._history.setdefault(name, HistoryBuffer(max_length=HISTORY_LENGTH)).update(value, iteration)
        self._latest[name] = (value, iteration)
        self._sequence += 1
        self._updates.append((self._sequence, name, value, iteration))

    def put_scalars(
        self,
        values: Mapping[str, float],
        *,
        smoothing_hint: bool = True,
        cur_iter: int | None = None,
        role: str = "",
    ) -> None:
        """``put_scalar`` for each entry."""
        for name, value in values.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter, role=role)

    def put_image(self, name: str, image: np.ndarray | Tensor) -> None:
        """Keep an image, [H, W, C] or [H, W], uint8, for writers that show images. The last 64 are kept.

        Raises:
            ValueError: for another shape or dtype.
        """
        array = np.array(
            image.detach().cpu().numpy() if isinstance(image, Tensor) else image
        )  # a copy: buffers are reused
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ValueError(f"put_image takes uint8 [H, W, C] or [H, W]; got {array.dtype} {list(array.shape)}.")
        self._sequence += 1
        self._images.append(Image(self._sequence, self._prefix + name, array, self.iter))

    def put_histogram(self, name: str, values: Tensor, bins: int = 100) -> None:
        """Keep a histogram of the finite values of a tensor of any shape. The last 64 are kept."""
        flat = values.detach().float().cpu().numpy().ravel()
        counts, edges = np.histogram(flat[np.isfinite(flat)], bins=bins)
        self._sequence += 1
        self._histograms.append(Histogram(self._sequence, self._prefix + name, counts, edges, self.iter))

    def history(self, name: str) -> HistoryBuffer:
        """The last 1024 values of ``name``.

        Raises:
            KeyError: if nothing was put under it.
        """
        if name not in self._history:
            raise KeyError(f"No scalar {name!r} in the storage; there are: {', '.join(sorted(self._history))}.")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._history

    def names(self, role: str) -> list[str]:
        """Names with this role, in the order they were first put."""
        return [name for name, its_role in self._role.items() if its_role == role]

    def role(self, name: str) -> str:
        return self._role[name]

    def latest(self) -> dict[str, tuple[float, int]]:
        """Last (value, iteration) of every scalar."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As ``latest``, with the median over the last ``window_size`` iterations where smoothing is hinted."""
        return {
            name: (self.smoothed(name, window_size) if self._smoothing_hint[name] else value, iteration)
            for name, (value, iteration) in self._latest.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Values of ``name`` put within the last ``window_size`` iterations."""
        last = self._latest[name][1]
        return sum(1 for _, iteration in self._history[name].values()[-window_size:] if iteration > last - window_size)

    def smoothed(self, name: str, window_size: int = 20) -> float:
        """Median of ``name`` over the last ``window_size`` iterations."""
        return float(self._history[name].median(self.count_samples(name, window_size)))

    def updates_since(self, sequence: int) -> tuple[list[tuple[str, float, int]], int]:
        """All (name, value, iteration) put after ``sequence``, and the sequence number to ask from next time."""
        new = []
        for number, name, value, iteration in reversed(self._updates):  # what is old is not looked at again
            if number <= sequence:
                break
            new.append((name, value, iteration))
        return new[::-1], self._sequence

    def images_since(self, sequence: int) -> list[Image]:
        return [image for image in self._images if image.sequence > sequence]

    def histograms_since(self, sequence: int) -> list[Histogram]:
        return [histogram for histogram in self._histograms if histogram.sequence > sequence]

    @contextlib.contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Put a prefix ``name/`` before every name in the block."""
        outer = self._prefix
        self._prefix = f"{outer}{name.rstrip('/')}/"
        try:
            yield
        finally:
            self._prefix = outer

    def state_dict(self) -> dict[str, Any]:
        """The metric history as plain numbers and lists, so that medians and the ETA survive a resume."""
        return {
            name: {
                "values": [[float(v), int(i)] for v, i in buffer.values()],
                "smoothing_hint": self._smoothing_hint[name],
                "role": self._role[name],
            }
            for name, buffer in self._history.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``. Restored values count as updates: some may not have reached a file before the run
        ended; writers tell by the iteration what they have."""
        for name, entry in state.items():
            for value, iteration in entry["values"]:
                self.put_scalar(
                    name, value, smoothing_hint=entry["smoothing_hint"], cur_iter=iteration, role=entry["role"]
                )
        self.restored_sequence = self._sequence

    def __enter__(self) -> EventStorage:
        _storages.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        last = _storages.pop()
        assert last is self, "event storages were closed in another order than opened"
