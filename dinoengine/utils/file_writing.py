"""Writing that never leaves a half-written file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import IO, Any

# What file systems say that have no way to flush the names of a folder (some of FUSE and SMB), or let nobody read them.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that replaces ``path`` when the block ends, and not before.

    The data goes to a temporary file in the same folder, is flushed to disk, and then renamed over ``path``: a crash
    at any moment leaves the old file or the new one. On an error in the block ``path`` is untouched. What a killed process
    leaves behind goes with ``remove_stale_temporaries``.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    # Not mkstemp: its files are private, and a checkpoint is shared like any other file. The umask applies here.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, mode) as file:
            _lock(descriptor)  # for as long as the file is open: it is being written
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def append_whole(path: str, data: bytes) -> None:
    """Append all of ``data`` or nothing, making the file if it is not there.

    Raises:
        OSError: if it cannot be written; the file then is as it was.
    """
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def write_json(path: str, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all.

    NaN and infinities, which JSON does not have, become null, as in metrics.json; what measures them says why.
    """
    with atomic_write(path, "w") as file:
        json.dump(_with_null(content), file, indent=indent, allow_nan=False)
        file.write("\n")


def _with_null(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _with_null(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(part) for part in value]
    return value


def remove_stale_temporaries(folder: str) -> list[str]:
    """Remove what killed processes have left of ``atomic_write`` in a folder; the names of what was removed.

    A file that some process is still writing is locked, and stays; so does every file where the file system has no locks.
    """
    removed = []
    for name in sorted(os.listdir(folder)):
        if not _TEMPORARY.fullmatch(name):
            continue
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            if _lock(file.fileno()):
                os.unlink(path)
                removed.append(name)
    return removed


def _lock(descriptor: int) -> bool:
    """Whether this process holds the lock of the file now; False also where there are none."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: str) -> None:
    """Flush the names in a folder to disk, where the file system can.

    Where it cannot, a crash of the machine may lose the newest names; the files before them are as they were.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
