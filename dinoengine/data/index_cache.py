"""The indexes that are kept in the cache: what each is of, and which of them nothing can use any more."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from dinoengine.data.array_file import read_arrays
from dinoengine.data.file_index import cache_folder
from dinoengine.utils.file_writing import remove_stale_temporaries
from dinoengine.utils.printable import printable

_ENDINGS = (".index", ".tars")
_LOCK_ENDING = ".lock"


class KeptIndex(NamedTuple):
    """A file of the cache.

    Attributes:
        path: of the index.
        source: the folder, or the first of the shards; empty if the file cannot be read.
        num_bytes: its size.
        is_usable: whether it can be read, and the folder or all of the shards are there.
    """

    path: str
    source: str
    num_bytes: int
    is_usable: bool


def kept_indexes() -> list[KeptIndex]:
    """Those in ``cache_folder()``, by path. The ones in a folder ``extra`` of ImageNet are not among them."""
    folder = os.path.join(cache_folder(), "index")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [_look_at(os.path.join(folder, name)) for name in names if name.endswith(_ENDINGS)]


def prune() -> list[KeptIndex]:
    """Remove the indexes that are not usable, and what dead processes left; the indexes that were removed.

    A training that has one open keeps it: its pages stay until the last process ends.
    """
    removed = [index for index in kept_indexes() if not index.is_usable]
    folder = os.path.join(cache_folder(), "index")
    for index in removed:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.unlink(index.path)
    if os.path.isdir(folder):
        remove_stale_temporaries(folder)
        names = set(os.listdir(folder))
        for name in names:
            if name.endswith(_LOCK_ENDING) and name.removesuffix(_LOCK_ENDING) not in names:
                with contextlib.suppress(FileNotFoundError):  # who still waits for it scans at the same time as others
                    os.unlink(os.path.join(folder, name))
    return removed


def describe_indexes(indexes: list[KeptIndex], folder: str) -> str:
    """A line each, and their sum."""
    lines = [
        f"{index.num_bytes:>15,}  {'' if index.is_usable else 'unusable: '}{index.source or 'no index'} ({index.path})"
        for index in indexes
    ]
    total = sum(index.num_bytes for index in indexes)
    return "\n".join([*map(printable, lines), f"{len(indexes)} index(es), {total:,} bytes, in {folder}"])


def _look_at(path: str) -> KeptIndex:
    num_bytes = os.path.getsize(path)
    try:
        facts = read_arrays(path).facts
        if path.endswith(".tars"):
            shards = [shard for shard, *_ in facts["shards"]]
            return KeptIndex(path, shards[0], num_bytes, all(map(os.path.isfile, shards)))
        return KeptIndex(path, facts["root"], num_bytes, os.path.isdir(facts["root"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return KeptIndex(path, "", num_bytes, False)
