"""The images below a folder, found once: the index of a large folder is kept on disk and mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from dinoengine.data.array_file import ArrayFile, read_arrays, write_arrays
from dinoengine.data.fingerprint import fingerprint
from dinoengine.data.folder_scan import EXTENSIONS, FolderScan, scan_folder, scan_url, unchanged
from dinoengine.data.path_table import PathTable
from dinoengine.utils.file_io import is_url

# Smaller folders are scanned each time: that takes about as long as seeing whether their index is still true.
MIN_IMAGES = 10_000
# An index that was written so soon after a folder changed may have missed a change within the same tick of the clock.
_TICK_NS = 2_000_000_000
_VERSION = 1

logger = logging.getLogger(__name__)


class FileIndex:
    """Paths and labels of the images below a folder.

    Attributes:
        root: absolute.
        paths: relative to it, sorted.
        labels: [images] int32: first-level folder of each image; None if some lie directly in the root.
        class_names: name of each first-level folder with images, sorted; None without labels.
        file: where the index is kept; None if it is in the memory of this process alone.
    """

    def __init__(self, root: str, paths: PathTable, labels: np.ndarray | None, class_names: list[str] | None) -> None:
        self.root, self.paths, self.labels, self.class_names = root, paths, labels, class_names
        self.file: str | None = None
        self._written_ns = 0

    @classmethod
    def _of_file(cls, path: str, content: ArrayFile) -> FileIndex:
        arrays, facts = content.arrays, content.facts
        index = cls(
            facts["root"], PathTable(arrays["paths"], arrays["ends"]), arrays.get("labels"), facts["class_names"]
        )
        index.file, index._written_ns = path, content.mtime_ns
        return index

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """See ``ImageDataset.fingerprint``; labels follow from the paths."""
        return fingerprint(self.paths.data, self.paths.ends)

    @property
    def files(self) -> list[str]:
        """``file``, if there is one."""
        return [] if self.file is None else [self.file]

    def path(self, index: int) -> str:
        """Absolute path of an image."""
        return os.path.join(self.root, self.paths[index])

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked maps the same file, unless another index has taken its name.
        with contextlib.suppress(OSError):
            if self.file is not None and os.stat(self.file).st_mtime_ns == self._written_ns:
                return _reopen, (self.file, self._written_ns)
        arrays = np.array(self.paths.data), np.array(self.paths.ends), _copy(self.labels)
        return _from_memory, (self.root, *arrays, self.class_names)


class NoImagesError(FileNotFoundError):
    """A folder without images; ``found``: which other files it holds."""

    def __init__(self, root: str, others: Counter[str], extensions: frozenset[str] = EXTENSIONS) -> None:
        self.found = ", ".join(f"{n} x {ext or 'no extension'}" for ext, n in others.most_common(5)) or "nothing"
        super().__init__(
            f"Image folder {root} holds no image; found {self.found}. "
            f"Accepted extensions: {' '.join(sorted(extensions))}."
            + (" Arrays are listed with folder:...:arrays=true." if ".npy" in others else "")
        )


def index_folder(
    root: str,
    *,
    cached: bool = True,
    keep_in: str = "",
    min_images: int = MIN_IMAGES,
    extensions: frozenset[str] = EXTENSIONS,
) -> FileIndex:
    """The images below a folder, from the index on disk if that is still true.

    It is true while no folder below ``root`` has had an entry added, removed or renamed. Of several processes that find
    none, one scans and the others wait for it.

    Args:
        root: absolute, or a URL, of which no index is kept: it has no times that would tell of a change.
        cached: False: neither read nor write an index.
        keep_in: file of the index; empty: one in ``cache_folder()``. A file that cannot be written is kept there, too.
        min_images: of fewer no index is kept.
        extensions: of the files that count.

    Raises:
        NoImagesError: if there is no image.
        OSError: if a folder cannot be listed.
    """
    if not cached or is_url(root):
        return _in_memory(root, _scan(root, extensions))
    which = b"" if extensions == EXTENSIONS else b"\0" + " ".join(sorted(extensions)).encode()
    name = hashlib.sha256(os.fsencode(root) + which).hexdigest()[:32]
    in_cache = os.path.join(cache_folder(), "index", f"{name}.index")
    places = [place for place in (keep_in, in_cache) if place]
    for place in places:
        if (index := _read_if_true(place, root, extensions)) is not None:
            return index
    with _one_at_a_time(in_cache):
        for place in places:  # another process may have made it while this one waited
            if (index := _read_if_true(place, root, extensions)) is not None:
                return index
        start = time.monotonic()
        scan = _scan(root, extensions)
        index = _in_memory(root, scan)
        if len(index) < min_images:
            return index
        for place in places:
            if _write(place, index, scan, extensions):
                seconds = time.monotonic() - start
                logger.info(f"Indexed {len(index):,} images below {root} in {seconds:.1f} s; the index is {place}.")
                return FileIndex._of_file(place, read_arrays(place))
    return index


def cache_folder() -> str:
    """$DINOENGINE_CACHE, or dinoengine in $XDG_CACHE_HOME or ~/.cache."""
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.abspath(os.environ.get("DINOENGINE_CACHE") or os.path.join(parent, "dinoengine"))


def _scan(root: str, extensions: frozenset[str]) -> FolderScan:
    scan = scan_url(root, extensions) if is_url(root) else scan_folder(root, extensions)
    if not scan.paths:
        raise NoImagesError(root, scan.others, extensions)
    return scan


def _in_memory(root: str, scan: FolderScan) -> FileIndex:
    tops = [path.split(os.sep, 1)[0] if os.sep in path else None for path in scan.paths]
    names = sorted({top for top in tops if top is not None})
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    labels = None if None in tops else np.fromiter((number[top] for top in tops), dtype=np.int32, count=len(tops))
    return FileIndex(root, PathTable.of(scan.paths), labels, None if labels is None else names)


def _write(path: str, index: FileIndex, scan: FolderScan, extensions: frozenset[str]) -> bool:
    folders = PathTable.of(folder for folder, _ in scan.folders)
    arrays = {
        "paths": index.paths.data,
        "ends": index.paths.ends,
        "folders": folders.data,
        "folder_ends": folders.ends,
        "stamps": np.array([stamp for _, stamp in scan.folders], dtype=np.int64),
    }
    if index.labels is not None:
        arrays["labels"] = index.labels
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_arrays(path, {**_facts(index.root, extensions), "class_names": index.class_names}, arrays)
    except OSError as error:
        logger.warning(f"The index of {index.root} cannot be kept in {path} ({error.strerror}).")
        return False
    return True


def _facts(root: str, extensions: frozenset[str]) -> dict[str, Any]:
    return {"version": _VERSION, "root": root, "extensions": sorted(extensions)}


def _read_if_true(path: str, root: str, extensions: frozenset[str]) -> FileIndex | None:
    try:
        content = read_arrays(path)
    except (OSError, ValueError):
        return None
    if any(content.facts.get(key) != value for key, value in _facts(root, extensions).items()):
        return None
    stamps = content.arrays["stamps"]
    if content.mtime_ns - int(stamps.max()) < _TICK_NS:
        return None
    folders = list(PathTable(content.arrays["folders"], content.arrays["folder_ends"]))
    return FileIndex._of_file(path, content) if unchanged(root, folders, stamps.tolist()) else None


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """Held by one process of this machine at a time, until it ends the block or dies."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):  # without locks all of them scan, which is slower, not wrong
            import fcntl

            os.makedirs(os.path.dirname(path), exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{path}.lock", "ab")), fcntl.LOCK_EX)
        yield


def _reopen(path: str, written_ns: int) -> FileIndex:
    content = read_arrays(path)
    if content.mtime_ns != written_ns:
        raise RuntimeError(f"The index {path} was made anew while a process was started with it; start the run again.")
    return FileIndex._of_file(path, content)


def _from_memory(
    root: str, data: np.ndarray, ends: np.ndarray, labels: np.ndarray | None, class_names: list[str] | None
) -> FileIndex:
    return FileIndex(root, PathTable(data, ends), labels, class_names)


def _copy(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.array(array)
