"""Images that a training set and a test set share, by name or as copies under other names."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable

from dinoengine.data import ImageDataset
from dinoengine.utils import comm
from dinoengine.utils.file_io import is_url
from dinoengine.utils.logger import log_first_n
from dinoengine.utils.printable import printable

# What the search for copies may cost: files whose size is asked for, and bytes that are read.
MOST_FILES = 200_000
MOST_BYTES = 2 * 2**30
_END_BYTES = 4096

_searched: set[tuple[tuple[str, ...], str]] = set()


def shared_images(first: ImageDataset, second: ImageDataset) -> list[str]:
    """What both datasets hold under the same name (path, or dataset and index)."""
    names = {first.describe(i) for i in range(len(first))}
    return [name for i in range(len(second)) if (name := second.describe(i)) in names]


class _OverBudgetError(Exception):
    """More would have to be read than is allowed."""


class _Reader:
    """Reads files until that is more than so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes

    def end(self, path: str, num_bytes: int) -> bytes:
        """The last bytes of a file."""
        self._left -= num_bytes
        if self._left < 0:
            raise _OverBudgetError
        with open(path, "rb") as file:
            file.seek(-num_bytes, os.SEEK_END)
            return file.read()


def copied_files(train: Iterable[str], test: Iterable[str], most_bytes: int = MOST_BYTES) -> dict[str, str] | None:
    """Files of ``test`` whose bytes are those of a file of ``train`` with another name.

    Only files of the same size are read: first their ends, in which images differ sooner than in their headers, then
    those with the same end as a whole.

    Args:
        train, test: paths; those of ``test`` that are in ``train`` under the same name are passed over.

    Returns:
        Test file -> a training file that equals it; None if more than ``most_bytes`` would have to be read.
    """
    train_paths = list(dict.fromkeys(train))
    test_paths = list(dict.fromkeys(test).keys() - set(train_paths))
    sizes = {path: os.path.getsize(path) for path in (*train_paths, *test_paths)}
    reader = _Reader(most_bytes)
    keys: tuple[Callable[[str], object], ...] = (
        lambda path: sizes[path],
        lambda path: reader.end(path, min(sizes[path], _END_BYTES)),
        lambda path: hashlib.sha256(reader.end(path, sizes[path])).digest(),
    )
    groups = [(train_paths, sorted(test_paths))]  # equal as far as is known
    try:
        for key_of in keys:
            groups = [finer for group in groups for finer in _split(*group, key_of)]
    except _OverBudgetError:
        return None
    return {path: originals[0] for originals, copies in groups for path in copies}


def _split(train: list[str], test: list[str], key_of: Callable[[str], object]) -> list[tuple[list[str], list[str]]]:
    """The parts of a group of files in which a key is the same, where both sets have some."""
    parts: dict[object, tuple[list[str], list[str]]] = {}
    for path in test:
        parts.setdefault(key_of(path), ([], []))[1].append(path)
    for path in train:
        if (key := key_of(path)) in parts:
            parts[key][0].append(path)
    return [part for part in parts.values() if part[0]]


def warn_of_shared_images(
    train_set: ImageDataset, test_set: ImageDataset, which: str, train_strings: tuple[str, ...]
) -> None:
    """Warn of images that are in both sets by name, and once in a process of files that are copies.

    Args:
        which: what the test set is called.
        train_strings: the training set; with ``which`` it tells whether copies were looked for already.
    """
    if shared := shared_images(train_set, test_set):
        log_first_n(
            logging.WARNING,
            f"{len(shared)} of {len(test_set)} images of the {which} are in the training set as well, e.g. "
            f"{shared[0]}: results are better than they would be on new images.",
            name=__name__,
        )
    if comm.is_main_process() and (train_strings, which) not in _searched:
        _searched.add((train_strings, which))
        _warn_of_copies(train_set, test_set, which)


def _warn_of_copies(train_set: ImageDataset, test_set: ImageDataset, which: str) -> None:
    if _file(train_set, 0) is None or _file(test_set, 0) is None:
        return  # no files of single images
    logger = logging.getLogger(__name__)
    num_files = len(train_set) + len(test_set)
    if num_files > MOST_FILES:
        logger.info("Copies under other names were not looked for: %d files are more than %d.", num_files, MOST_FILES)
        return
    train, test = ([path for i in range(len(s)) if (path := _file(s, i)) is not None] for s in (train_set, test_set))
    copies = copied_files(train, test, MOST_BYTES)
    if copies is None:
        logger.info(
            "Copies under other names were not looked for in the %s: that would read more than %d MiB.",
            which,
            MOST_BYTES // 2**20,
        )
    elif copies:
        logger.warning(
            "%d of %d images of the %s are copies of training images under other names, e.g. %s of %s: results are better "
            "than they would be on new images.",
            len(copies),
            len(test_set),
            which,
            *map(printable, next(iter(copies.items()))),
        )


def _file(dataset: ImageDataset, index: int) -> str | None:
    path = dataset.path(index)
    return None if path is None or is_url(path) else path  # reading what is far away would take too long
