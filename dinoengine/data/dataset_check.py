"""What is in a dataset, and what is wrong with it: every image inspected once, by several processes.

Of each image some 60 bytes are kept, whatever its size, so a million of them take 60 MB.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from dinoengine.data.build import init_worker
from dinoengine.data.channels import Channels
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.inspection import Inspection, Inspections, kind_of
from dinoengine.data.perceptual_hash import groups_of, near_pairs

NOT_IN_A_GROUP = -1

_CHUNK = 32
_ROW = np.dtype(
    [
        ("content", "V16"),
        ("look", np.uint64),
        ("width", np.int32),
        ("height", np.int32),
        ("num_bytes", np.int64),
        ("mode", np.int16),
        ("is_bad", np.bool_),
        ("has_look", np.bool_),
        ("is_blank", np.bool_),
    ]
)


@dataclass
class Inspected:
    """A dataset whose images were inspected.

    Attributes:
        rows: [images] of fields content, look, width, height, num_bytes, mode (number in ``modes``), is_bad, has_look,
            is_blank.
        modes: see ``Inspection``, in the order in which they were met.
        causes: index of each bad image -> why.
        mean, std: [C] of red, green and blue, or of each channel, over the good images, in units of 0..1; every image
            counts the same, as it does in training, where each gives crops of one size.
        decode_seconds: mean time to read and decode an image in one process.
        channels: what the images are if they are arrays.
    """

    dataset: ImageDataset
    rows: np.ndarray
    modes: list[str]
    causes: dict[int, str]
    mean: np.ndarray
    std: np.ndarray
    decode_seconds: float
    channels: Channels | None = None

    @property
    def is_good(self) -> np.ndarray:
        return ~self.rows["is_bad"]

    @property
    def num_good(self) -> int:
        return int(self.is_good.sum())

    def kinds(self) -> Counter[str]:
        """How many bad images there are of each kind; see ``inspection.kind_of``."""
        return Counter(map(kind_of, self.causes.values()))

    def num_of_mode(self) -> dict[str, int]:
        """Good images of each mode, most frequent first."""
        counts = np.bincount(self.rows["mode"][self.is_good], minlength=len(self.modes))
        return dict(sorted(zip(self.modes, counts.tolist(), strict=True), key=lambda item: -item[1]))

    def smaller_than(self, side_px: int) -> np.ndarray:
        """Indices of good images whose shorter side has fewer pixels."""
        shorter = np.minimum(self.rows["width"], self.rows["height"])
        return np.flatnonzero(self.is_good & (shorter < side_px))

    def larger_than(self, num_pixels: int) -> np.ndarray:
        """Indices of good images with more pixels."""
        area = self.rows["width"].astype(np.int64) * self.rows["height"]
        return np.flatnonzero(self.is_good & (area > num_pixels))

    def blank(self) -> np.ndarray:
        """Indices of images that show nothing."""
        return np.flatnonzero(self.rows["is_blank"])


@dataclass
class Duplicates:
    """Images that are there more than once.

    Attributes:
        exact_group: [images] int64, number of the group of images with the same pixels; NOT_IN_A_GROUP if alone.
        near_group: the same of images that look alike, exact copies among them; those without a look are left out.
        is_complete: see ``perceptual_hash.Neighbours``.
    """

    exact_group: np.ndarray
    near_group: np.ndarray
    is_complete: bool

    def extra(self, groups: np.ndarray) -> np.ndarray:
        """Indices of all but the first image of each group."""
        members = np.flatnonzero(groups != NOT_IN_A_GROUP)
        _, first = np.unique(groups[members], return_index=True)
        return np.delete(members, first)


@dataclass
class Leaks:
    """Images of a dataset that another one has as well.

    Attributes:
        exact: index -> an index of the other with the same pixels.
        near: index -> an index of the other that looks alike; without those in ``exact``.
        is_complete: see ``perceptual_hash.Neighbours``.
    """

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)
    is_complete: bool = True


def inspect_dataset(
    dataset: ImageDataset,
    num_workers: int,
    progress: Callable[[int], Any] = lambda num_images: None,
    channels: Channels | None = None,
) -> Inspected:
    """Inspect every image.

    Args:
        num_workers: processes; 0: in this one.
        progress: called with the number of images that were inspected since the last call.
        channels: see ``Inspections``.

    Raises:
        RuntimeError: if a process dies, as by an image that takes all memory to decode.
    """
    rows = np.zeros(len(dataset), dtype=_ROW)
    modes: dict[str, int] = {}
    causes: dict[int, str] = {}
    sums, seconds, index = np.zeros((2, 3 if channels is None else channels.count)), 0.0, 0
    for chunk in _inspections(Inspections(dataset, channels), num_workers):
        for found in chunk:
            if found.cause:
                causes[index] = found.cause
                rows[index]["num_bytes"], rows[index]["is_bad"] = found.num_bytes, True
            else:
                mode = modes.setdefault(found.mode, len(modes))
                size = (found.width, found.height, found.num_bytes)
                rows[index] = (found.content, found.look, *size, mode, False, found.has_look, found.is_blank)
                sums += (found.mean, found.square)
                seconds += found.seconds
            index += 1
        progress(len(chunk))
    num_good = max(1, len(dataset) - len(causes))
    mean = sums[0] / num_good
    std = np.sqrt(np.maximum(0.0, sums[1] / num_good - mean**2))
    return Inspected(dataset, rows, list(modes), causes, mean, std, seconds / num_good, channels)


def _inspections(images: Inspections, num_workers: int) -> Iterator[list[Inspection]]:
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_size=_CHUNK,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=init_worker,
        prefetch_factor=4 if num_workers else None,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"{error} The machine may be out of memory: take fewer workers, or a lower --max-image-pixels."
        ) from error


def find_duplicates(inspected: Inspected, max_distance: int) -> Duplicates:
    """Images with the same pixels, and images whose hashes differ in at most ``max_distance`` bits.

    Whatever is near one of a group is in the group.
    """
    rows = inspected.rows
    exact = np.full(len(rows), NOT_IN_A_GROUP)
    good = np.flatnonzero(inspected.is_good)
    _, number = np.unique(rows["content"][good].view("S16"), return_inverse=True)
    exact[good] = _several(number)
    near = np.full(len(rows), NOT_IN_A_GROUP)
    shown = np.flatnonzero(rows["has_look"])
    looks, number = np.unique(rows["look"][shown], return_inverse=True)
    pairs = near_pairs(looks, max_distance)
    near[shown] = _several(groups_of(pairs.first, pairs.second, len(looks))[number])
    return Duplicates(exact, near, pairs.is_complete)


def _several(groups: np.ndarray) -> np.ndarray:
    """The numbers of groups with more than one member; others become NOT_IN_A_GROUP."""
    counts = np.bincount(groups)
    return np.where(counts[groups] > 1, groups, NOT_IN_A_GROUP)


def find_leaks(inspected: Inspected, other: Inspected, max_distance: int) -> Leaks:
    """Images of ``inspected`` that ``other`` has as well, the same or nearly."""
    mine, theirs = np.flatnonzero(inspected.is_good), np.flatnonzero(other.is_good)
    exact = _first_equal(inspected.rows["content"][mine].view("S16"), other.rows["content"][theirs].view("S16"))
    leaks = Leaks(exact={int(mine[i]): int(theirs[j]) for i, j in exact})
    mine = np.flatnonzero(inspected.rows["has_look"])
    theirs = np.flatnonzero(other.rows["has_look"])
    looks, number = np.unique(
        np.concatenate([inspected.rows["look"][mine], other.rows["look"][theirs]]), return_inverse=True
    )
    in_other = np.full(len(looks), -1)
    in_other[number[len(mine) :]] = theirs  # any of those that look so
    pairs = near_pairs(looks, max_distance)
    leaks.is_complete = pairs.is_complete
    partner = in_other.copy()
    for one, another in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
        known = (partner[one] < 0) & (in_other[another] >= 0)
        partner[one[known]] = in_other[another[known]]
    for index, look in zip(mine.tolist(), number[: len(mine)].tolist(), strict=True):
        if partner[look] >= 0 and index not in leaks.exact:
            leaks.near[index] = int(partner[look])
    return leaks


def _first_equal(mine: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int]]:
    """(place in ``mine``, first place in ``theirs``) of equal entries."""
    if not len(theirs):
        return
    values, first = np.unique(theirs, return_index=True)
    place = np.searchsorted(values, mine).clip(max=len(values) - 1)
    for i in np.flatnonzero(values[place] == mine).tolist():
        yield i, int(first[place[i]])


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
