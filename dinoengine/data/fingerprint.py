"""Whether a dataset or a file is still what it was: a hash of what it holds, of which a bounded part is read.

Up to MAX_BYTES every byte counts. Of more, the length and NUM_BLOCKS blocks spread evenly over it, the first and the last
among them, do; the files of a folder share them. What is added or removed is seen, what is replaced by something of the
same length may not be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_BYTES = 64 << 20
NUM_BLOCKS = 1024
_BLOCK_BYTES = MAX_BYTES // NUM_BLOCKS


def fingerprint(*parts: np.ndarray | str | None) -> str:
    """Of arrays (types, shapes and values) and texts, in their order; None is a part of its own."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"a{part.dtype.str}{part.shape};".encode())
            _add_bytes(digest, np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            digest.update(b"n" if part is None else b"t")
            _add_bytes(digest, memoryview((part or "").encode("utf-8", "surrogatepass")))
    return digest.hexdigest()


def file_fingerprint(path: str) -> str | None:
    """Of a file, or of the files in a folder and their names; None if there is none that can be read here."""
    digest = hashlib.sha256()
    try:
        if not os.path.isdir(path):
            _add_file(digest, path, NUM_BLOCKS)
            return digest.hexdigest()
        names = [name for name in sorted(os.listdir(path)) if os.path.isfile(os.path.join(path, name))]
        for name in names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            _add_file(digest, os.path.join(path, name), max(2, NUM_BLOCKS // len(names)))
    except OSError:
        return None
    return digest.hexdigest()


def _add_bytes(digest: Any, content: memoryview) -> None:
    _add(digest, len(content), lambda start, size: content[start : start + size], NUM_BLOCKS)


def _add_file(digest: Any, path: str, num_blocks: int) -> None:
    with open(path, "rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        _add(digest, num_bytes, lambda start, size: os.pread(file.fileno(), size, start), num_blocks)


def _add(digest: Any, num_bytes: int, read: Callable[[int, int], Any], num_blocks: int) -> None:
    """``read(start, size)`` gives a part of the content; of ``num_blocks``, 2 or more, at most."""
    digest.update(f"{num_bytes};".encode())
    if num_bytes <= num_blocks * _BLOCK_BYTES:
        starts = list(range(0, num_bytes, _BLOCK_BYTES))
    else:
        last = num_bytes - _BLOCK_BYTES
        starts = [last * i // (num_blocks - 1) for i in range(num_blocks)]
    for start in starts:
        digest.update(read(start, min(_BLOCK_BYTES, num_bytes - start)))
