"""What iopath reads URLs with here: http(s) within a time limit, and what fsspec knows (s3, gs, hdfs ...).

A handler of your own for a protocol takes its place: ``path_manager().register_handler(handler, allow_override=True)``.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
from iopath.common.file_io import PathHandler, PathManager, file_lock, get_cache_dir

from dinoengine.utils.file_writing import atomic_write

# Without any sign of the server for so long a request has failed: a training must not wait for ever.
TIMEOUT_SECONDS = 60.0
_NUM_TRIES = 3
_CHUNK_BYTES = 1 << 20
_RESERVED = "%/:=&?~#+!$,;'@()*[]"
_HTTP = ("http", "https")

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class URLManager(PathManager):
    """A PathManager that can tell whether it would take a URL for a local file."""

    def reads(self, url: str) -> bool:
        """Whether a handler is registered for its protocol."""
        return url.startswith(tuple(self._path_handlers))


class _CachingHandler(PathHandler):
    """Keeps whole files under a name of the whole URL; two servers may have files of the same path."""

    def _get_local_path(self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        name = os.path.basename(urlsplit(path).path)[-100:]
        folder = os.path.join(get_cache_dir(cache_dir), "urls")
        cached = os.path.join(folder, f"{hashlib.sha256(path.encode()).hexdigest()[:32]}-{name}")
        os.makedirs(folder, exist_ok=True)
        with file_lock(cached):  # of the processes that want it one fetches it
            if force or not os.path.isfile(cached):
                logger.info("Fetching %s to %s", path, cached)
                with atomic_write(cached) as file:
                    self._fetch(path, file)
        return cached

    def _fetch(self, path: str, file: IO[bytes]) -> None:
        raise NotImplementedError


class HTTPHandler(_CachingHandler):
    """http and https by the standard library."""

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{protocol}://" for protocol in _HTTP]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        self._check_kwargs(kwargs)
        content = io.BytesIO()
        self._fetch(path, content)
        content.seek(0)
        return content if "b" in mode else io.TextIOWrapper(content)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        """Whether the server has it; one that does not answer HEAD is believed to."""

        def ask() -> bool:
            try:
                with _answer(path, "HEAD"):
                    return True
            except urllib.error.HTTPError as error:
                if error.code in (405, 501):
                    return True
                raise

        try:
            return _patiently(ask, path)
        except FileNotFoundError:
            return False

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path)

    def _fetch(self, path: str, file: IO[bytes]) -> None:
        def fetch() -> None:
            file.seek(0)
            file.truncate()
            with _answer(path, "GET") as answer:
                while chunk := answer.read(_CHUNK_BYTES):
                    file.write(chunk)
                if answer.length:  # what was announced and did not come
                    raise http.client.IncompleteRead(b"", answer.length)

        _patiently(fetch, path)


class FsspecHandler(_CachingHandler):
    """Every protocol of fsspec but those of this machine and http(s)."""

    def _get_supported_prefixes(self) -> list[str]:
        left_out = {"file", "local", *_HTTP}
        return [f"{protocol}://" for protocol in fsspec.available_protocols() if protocol not in left_out]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        self._check_kwargs(kwargs)
        system, inner = file_system(path)
        with errors_of(path):
            opened: IO[Any] = system.open(inner, mode)
        return opened

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return _type_of(path) == "file"

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return _type_of(path) is not None

    def _fetch(self, path: str, file: IO[bytes]) -> None:
        # Not get_file(): of some file systems (s3) it takes a path only.
        with errors_of(path), self._open(path, "rb") as source:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system of a URL, the path in it).

    Raises:
        ValueError: for an unknown protocol, or one whose package is not installed; says what to install.
    """
    try:
        system, inner = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        raise ValueError(
            f"Reading {url} needs a package for {protocol}:// that is not installed ({error}). For s3:// it is pip install "
            "'dinoengine[s3]', for hdfs:// 'dinoengine[parquet]' and Hadoop's libraries; the documentation of fsspec names "
            "those of others."
        ) from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be read: {error}.") from error
    return system, inner


def _type_of(url: str) -> str | None:
    """ "file" or "directory"; None if there is no such thing. Not isfile(), to which a refused login is no file either."""
    system, inner = file_system(url)
    try:
        with errors_of(url):
            return str(system.info(inner)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def files_below(url: str) -> list[str]:
    """Paths of all files below the folder that a URL names, relative to it, in no order.

    Raises:
        ValueError: for http(s), which cannot list a folder; see also ``file_system``.
    """
    if _is_http(url):
        raise ValueError(
            f"The folder {url} cannot be listed: http has no such request. Name its files in a list, list:/p/files.txt "
            "with root=URL, or put them into shards, wds:URL."
        )
    system, inner = file_system(url)
    start = len(inner.rstrip("/")) + 1
    with errors_of(url):
        return [path[start:] for path in system.find(inner)]


def urls_matching(pattern: str) -> list[str]:
    """URLs of the files that a pattern with ``*``, ``?`` or ``[...]`` names, sorted.

    Raises:
        ValueError: for http(s), which cannot list a folder; see also ``file_system``.
    """
    if _is_http(pattern):
        raise ValueError(
            f"{pattern} has a '*', and http has no request to list what is there. Write the numbers, such as "
            "shard-{000..099}.tar; a '*' that is part of the name is %2A."
        )
    system, inner = file_system(pattern)
    with errors_of(pattern):
        return sorted(system.unstrip_protocol(path) for path in system.glob(inner))


@contextlib.contextmanager
def errors_of(url: str) -> Iterator[None]:
    """Libraries behind fsspec raise errors of their own, such as that there are no credentials: all become OSError.

    Want of memory and a package that is missing say nothing of the URL, and stay what they are.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be read: {error}") from error


def _is_http(url: str) -> bool:
    return url.startswith(tuple(f"{protocol}://" for protocol in _HTTP))


def _answer(url: str, method: str) -> Any:
    # Spaces and other alphabets are not allowed in a request; what is quoted already stays as it is.
    request = urllib.request.Request(quote(url, safe=_RESERVED), method=method)
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def _patiently(work: Callable[[], Result], url: str) -> Result:
    """``work``, again after a pause if the network or the server had a moment of weakness.

    Raises:
        FileNotFoundError: if the server has no such file.
        OSError: if it cannot be read; names the URL.
    """
    for attempt in range(1, _NUM_TRIES + 1):
        try:
            return work()
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 500
            if code in (404, 410):
                raise FileNotFoundError(f"{url} does not exist (HTTP status {code}).") from error
            if attempt == _NUM_TRIES or (code < 500 and code != 429):
                raise OSError(f"{url} cannot be read: {error}.") from error
            logger.warning("%s could not be read (%s); attempt %d of %d follows.", url, error, attempt + 1, _NUM_TRIES)
            time.sleep(2.0 ** (attempt - 1))
    raise AssertionError("unreachable")
