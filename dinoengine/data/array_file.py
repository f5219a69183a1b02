"""Arrays and a few facts in one file, mapped into memory when they are read: all processes share its pages.

8 bytes    magic
8 bytes    length of the header, little-endian
header     JSON: {"facts": ..., "arrays": {name: [dtype, shape, offset behind the header]}}
arrays     in C order, each at a multiple of 64 bytes behind the header
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dinoengine.utils.file_writing import atomic_write

_MAGIC = b"dinoarr1"
_ALIGNMENT = 64


class ArrayFile(NamedTuple):
    """What a file holds.

    Attributes:
        facts: JSON values.
        arrays: read-only, of the file's pages.
        mtime_ns: when the file was written, by the clock of its file system.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    mtime_ns: int


def write_arrays(path: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file, whole or not at all. Processes that have open what it replaces keep the old one."""
    places, offset = {}, 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str, array.shape, offset)
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"facts": dict(facts), "arrays": places}).encode()
    header += b" " * (-(len(header) + 16) % _ALIGNMENT)
    with atomic_write(path) as file:
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)
            file.write(bytes(-array.nbytes % _ALIGNMENT))


def read_arrays(path: str) -> ArrayFile:
    """
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of ours or not whole.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        start = file.read(16)
        length = int.from_bytes(start[8:], "little")
        if len(start) < 16 or start[:8] != _MAGIC or length > status.st_size:
            raise ValueError(f"{path} is no file of arrays of this version.")
        try:
            header = json.loads(file.read(length))
            pages = np.memmap(file, dtype=np.uint8, mode="r")
            arrays = {name: _view(pages, 16 + length, *place) for name, place in header["arrays"].items()}
            return ArrayFile(header["facts"], arrays, status.st_mtime_ns)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}.") from None


def _view(pages: np.ndarray, start: int, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError("it holds Python objects")
    size = math.prod(shape) * kind.itemsize
    part = pages[start + offset : start + offset + size]
    if len(part) != size:
        raise ValueError("it ends early")
    array: np.ndarray = part.view(kind).reshape(shape).view(np.ndarray)
    return array
