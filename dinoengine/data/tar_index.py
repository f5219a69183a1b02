"""What lies where in tar files, so that any member can be read at once."""

from __future__ import annotations

import functools
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_BLOCK = 512
_OPEN_SHARDS = 64
_MOST_NAMES = 1_000_000

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A regular file in a tar: its name, where its content begins, and its size in bytes."""

    name: str
    offset: int
    size: int


def tar_members(path: str) -> Iterator[Member]:
    """The regular files of a tar in their order, from its headers alone: nothing is unpacked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no plain tar (a compressed one has no places) or ends within a member.
    """
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if end > os.fstat(file.fileno()).st_size:
                    raise ValueError(f"The tar {path} ends early, within {member.name}; get it anew.")
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                logger.warning(f"The tar {path} has no end mark: whoever wrote it may not have finished.")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no tar that can be read without unpacking ({error}). Unpack a compressed one "
            "(gunzip), or get it anew."
        ) from error


def read_member(path: str, offset: int, size: int) -> bytes:
    """The content of a member.

    Raises:
        OSError: if it cannot be read or the file ends before.
    """
    shard = _open(path)  # held here: the cache may drop it meanwhile
    data = os.pread(shard.descriptor, size, offset)
    if len(data) != size:
        raise OSError(
            f"{path} ends at a place that its index says holds an image; it was changed after it was indexed."
        )
    return data


class _Shard:
    """An open file, closed when the cache drops it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # not where opening failed
            os.close(self.descriptor)


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _open(path: str) -> _Shard:
    return _Shard(path)


def expand_braces(pattern: str) -> Sequence[str]:
    """``a-{000..002}.tar`` -> a-000.tar, a-001.tar, a-002.tar; ``{x,y}`` -> x, y; several braces: every combination.

    Raises:
        ValueError: for a brace that is not closed, a range that is none, or too many shards.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    end = pattern.find("}", start)
    if end < 0:
        raise ValueError(f"The brace of {pattern!r} is not closed; expected such as shard-{{000..099}}.tar.")
    inside, dots, last = pattern[start + 1 : end].partition("..")
    if dots:
        if not (inside.isdigit() and last.isdigit() and int(inside) <= int(last)):
            raise ValueError(f"{pattern[start : end + 1]!r} in {pattern!r} is no range such as {{000..099}}.")
        _require_few(pattern, int(last) - int(inside) + 1)
        choices = [f"{number:0{len(inside)}d}" for number in range(int(inside), int(last) + 1)]
    else:
        choices = inside.split(",")
    rests = expand_braces(pattern[end + 1 :])
    _require_few(pattern, len(choices) * len(rests))
    return [pattern[:start] + choice + rest for choice in choices for rest in rests]


def _require_few(pattern: str, count: int) -> None:
    if count > _MOST_NAMES:
        raise ValueError(f"{pattern!r} stands for {count:,} shards or more, and {_MOST_NAMES:,} are the most.")
