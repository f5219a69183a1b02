"""Images that are left out of a dataset by name: DATASETS.QUARANTINE.

A quarantine list is a text file in UTF-8 with one name per line. A line leaves out every image whose ``describe`` is that
name, character for character: for a file its absolute path as the dataset makes it (links are not followed), for an image
of a shard ``/p/shard.tar/name.jpg``. Empty lines and lines that begin with ``#`` say nothing.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dinoengine.data.dataset import ConcatImageDataset, ImageDataset
from dinoengine.data.fingerprint import fingerprint
from dinoengine.data.text_file import open_text
from dinoengine.utils.file_writing import atomic_write
from dinoengine.utils.printable import printable

_NUM_SHOWN = 3

logger = logging.getLogger(__name__)


class RemainingImages(ImageDataset):
    """A dataset without some of its images; the others keep their order. Memory is that of the list of left-out ones."""

    def __init__(self, dataset: ImageDataset, left_out: Sequence[int]) -> None:
        """
        Args:
            left_out: indices into ``dataset``, each once.
        """
        self.dataset = dataset
        self.class_names = dataset.class_names
        self.multi_label_class_names = dataset.multi_label_class_names
        self.mask_class_names = dataset.mask_class_names
        removed = np.sort(np.asarray(left_out, dtype=np.int64))
        # How many images are in front of each one that is left out.
        self._in_front = removed - np.arange(len(removed))

    def source_index(self, index: int) -> int:
        """The index of an image in the dataset it comes from."""
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is out of range: there are images 0..{len(self) - 1}.")
        return index + int(np.searchsorted(self._in_front, index, side="right"))

    def __len__(self) -> int:
        return len(self.dataset) - len(self._in_front)

    def load(self, index: int) -> Any:
        return self.dataset.load(self.source_index(index))

    def label(self, index: int) -> int | None:
        return self.dataset.label(self.source_index(index))

    def labels(self) -> np.ndarray:
        return np.delete(self.dataset.labels(), self._in_front + np.arange(len(self._in_front)))

    def source(self, index: int) -> int | None:
        return self.dataset.source(self.source_index(index))

    def multi_label(self, index: int) -> np.ndarray | None:
        return self.dataset.multi_label(self.source_index(index))

    def load_mask(self, index: int) -> np.ndarray | None:
        return self.dataset.load_mask(self.source_index(index))

    def path(self, index: int) -> str | None:
        return self.dataset.path(self.source_index(index))

    def describe(self, index: int) -> str:
        return self.dataset.describe(self.source_index(index))

    def fingerprint(self) -> str | None:
        whole = self.dataset.fingerprint()
        return None if whole is None else fingerprint(whole, self._in_front)

    def limit_pixels(self, max_image_pixels: int) -> None:
        self.dataset.limit_pixels(max_image_pixels)

    def load_channels(self, num_channels: int) -> None:
        self.dataset.load_channels(num_channels)


def without_quarantined(dataset: ImageDataset, files: Sequence[str]) -> ImageDataset:
    """The dataset without the images that the lists name; says in the log how many, and which names it does not have.

    A dataset of several stays one of several, so that their weights keep their meaning.

    Raises:
        FileNotFoundError: if a list does not exist.
        ValueError: if a list is no text, or nothing is left of the dataset, or of one of several.
    """
    if not files:
        return dataset
    names: set[str] = set()
    for file in files:
        names |= read_quarantine(file)
    found: set[str] = set()
    sources = dataset.datasets if isinstance(dataset, ConcatImageDataset) else [dataset]
    remaining = [_without(source, names, found) for source in sources]
    listed = f"DATASETS.QUARANTINE ({len(names)} name(s) in {len(files)} file(s))"
    kept = sum(map(len, remaining))
    logger.info("%s leaves out %d of %d images.", listed, len(dataset) - kept, len(dataset))
    if missing := sorted(names - found):
        shown = "".join(f"\n  {printable(name)}" for name in missing[:_NUM_SHOWN])
        logger.warning(
            "%d of the names of %s are of no image of DATASETS.TRAIN; a name must be that of the image character for "
            "character, as %s. The first of them:%s",
            len(missing),
            listed,
            printable(dataset.describe(0)),
            shown,
        )
    return remaining[0] if len(remaining) == 1 else ConcatImageDataset(remaining)


def read_quarantine(file: str) -> set[str]:
    """The names in a quarantine list.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text.
    """
    try:
        with open_text(file, newline="\n", what="The quarantine list (DATASETS.QUARANTINE) ") as lines:
            names = (line.rstrip("\r\n") for line in lines)
            return {name for name in names if name and not name.startswith("#")}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"The quarantine list {file} (DATASETS.QUARANTINE) does not exist; tools/check_dataset.py writes one."
        ) from None


def write_quarantine(file: str, reasons: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Write a quarantine list.

    Args:
        reasons: why, in a few words, and the names of the images; a name that has been written is not written again.

    Returns:
        Names that a list can not hold: those with a line break in them, and those that begin with ``#``.
    """
    written: set[str] = set()
    impossible: list[str] = []
    with atomic_write(file) as data:
        text = codecs.getwriter("utf-8")(data, "surrogateescape")
        for reason, names in reasons:
            text.write(f"# {reason}\n")
            for name in names:
                if name in written:
                    continue
                written.add(name)
                if "\n" in name or "\r" in name or name.startswith("#"):
                    impossible.append(name)
                else:
                    text.write(f"{name}\n")
    return impossible


def _without(dataset: ImageDataset, names: set[str], found: set[str]) -> ImageDataset:
    left_out = []
    for index in range(len(dataset)):
        name = dataset.describe(index)
        if name in names:
            found.add(name)
            left_out.append(index)
    if len(left_out) == len(dataset):
        raise ValueError(
            f"DATASETS.QUARANTINE leaves out all {len(dataset)} images of a dataset, the first of them "
            f"{printable(dataset.describe(0))}. Give another dataset, or another list."
        )
    return RemainingImages(dataset, left_out) if left_out else dataset
