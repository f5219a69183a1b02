"""Files that may lie anywhere: paths of this machine and URLs alike."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

_URL = re.compile(r"[A-Za-z][\w+.-]*://")


@functools.lru_cache(maxsize=1)
def path_manager() -> Any:
    """The process-wide iopath PathManager: local paths, http(s), and what fsspec reads; register further handlers on it."""
    from dinoengine.utils.url_handlers import FsspecHandler, HTTPHandler, URLManager

    manager = URLManager()
    manager.register_handler(HTTPHandler())
    manager.register_handler(FsspecHandler())
    return manager


def is_url(path: str) -> bool:
    """Whether a path begins with a protocol: ``s3://bucket/1.jpg``."""
    return _URL.match(path) is not None


def local_folder(path: str) -> str:
    """The absolute path of a folder that must be of this machine; ``~`` is the home folder.

    Raises:
        ValueError: for a URL.
    """
    if is_url(path):
        raise ValueError(
            f"{path} is a URL, and this dataset reads folders of this machine; folder:, list: and wds: read URLs."
        )
    return os.path.abspath(os.path.expanduser(path))


def read_bytes(path: str) -> bytes:
    """The content of a file or of what a URL names; nothing is cached.

    Raises:
        ValueError: for a protocol that no handler reads, or whose package is missing; says what to install.
        OSError: if it is not there or cannot be read.
    """
    from dinoengine.utils.url_handlers import errors_of

    _require_handler(path)
    with path_manager().open(path, "rb") as file, errors_of(path):
        content: bytes = file.read()
        return content


def is_file(path: str) -> bool:
    """Whether there is a file of this path or URL; raises as ``read_bytes`` does."""
    if not is_url(path):
        return os.path.isfile(path)
    _require_handler(path)
    return bool(path_manager().isfile(path))


def _require_handler(path: str) -> None:
    if is_url(path) and not path_manager().reads(path):
        protocol = path.partition("://")[0]
        raise ValueError(
            f"Nothing here reads {protocol}:// ({path}). Known are http, https and the protocols of fsspec (s3, gs, hdfs "
            "...); register a handler of your own with dinoengine.utils.file_io.path_manager()."
        )


def local_path(path: str) -> str:
    """A local copy of ``path`` (the path itself when it is local); downloads remote files into iopath's cache.

    Raises:
        ValueError: for a URL with ``..`` in it, for which handlers of others may write the copy outside of the cache, or of
            a protocol that no handler reads, or whose package is missing; says what to install.
        OSError: if it cannot be read.
    """
    if not is_url(path):
        return path
    if ".." in re.split(r"[/\\]", path):
        raise ValueError(f"The URL {path} has '..' in it; write it without.")
    _require_handler(path)
    return str(path_manager().get_local_path(path))
