"""Files: URI-agnostic reading, and writing that never leaves a half-written file."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any


@functools.lru_cache(maxsize=1)
def path_manager() -> Any:
    """The process-wide iopath PathManager: local paths and http(s) URLs; register further handlers on it."""
    from iopath.common.file_io import HTTPURLHandler, PathManager

    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    return manager


def local_path(path: str) -> str:
    """A local copy of ``path`` (the path itself when it is local); downloads remote files into iopath's cache."""
    return path if "://" not in path else str(path_manager().get_local_path(path))


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that replaces ``path`` when the block ends, and not before.

    The data goes to a temporary file in the same folder, is flushed to disk, and then renamed over ``path``: a crash
    at any moment leaves the old file or the new one. On an error in the block ``path`` is untouched.
    """
    folder = os.path.dirname(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; a checkpoint is shared like any other
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: str) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
