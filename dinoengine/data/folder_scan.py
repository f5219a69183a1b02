"""Which images lie below a folder."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
# Of arrays, which are images where somebody says so: many an .npy file beside pictures is something else.
ARRAY_EXTENSIONS = frozenset((".npy",))
# Listing a folder waits for the file system, above all for one on a network.
_NUM_THREADS = 16

Result = TypeVar("Result")


class FolderScan(NamedTuple):
    """What a folder holds.

    Attributes:
        paths: of the images, sorted, relative to it.
        others: how many files have each other extension.
        folders: those that were listed, with the time in ns when each last had an entry added, removed or renamed. It was
            read before the folder was listed, so that a change meanwhile is seen later.
    """

    paths: list[str]
    others: Counter[str]
    folders: list[tuple[str, int]]


class _Listing(NamedTuple):
    folders: list[str]
    images: list[str]
    others: Counter[str]


def is_image(name: str, extensions: frozenset[str] = EXTENSIONS) -> bool:
    """Whether a file name has the extension of an image, in any case."""
    return os.path.splitext(name)[1].lower() in extensions


def scan_folder(root: str, extensions: frozenset[str] = EXTENSIONS) -> FolderScan:
    """All images below ``root``; hidden files and folders are left out, links are followed, each folder is listed once.

    An image is a file with one of the ``extensions``. The result does not depend on the order in which the file system
    lists entries or threads finish.

    Raises:
        OSError: if a folder cannot be listed; names it.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    stamps: list[tuple[str, int]] = []
    visited: set[tuple[int, int]] = set()
    level = [root]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        while level:
            fresh = []
            for folder, status in zip(level, threads.map(_naming(os.stat), level), strict=True):
                if (status.st_dev, status.st_ino) not in visited:  # a link to a folder above would never end
                    visited.add((status.st_dev, status.st_ino))
                    fresh.append(folder)
                    stamps.append((os.path.relpath(folder, root), status.st_mtime_ns))
            level = []
            for listing in threads.map(_naming(lambda folder: _list(folder, extensions)), fresh):
                level += listing.folders
                paths += listing.images
                others += listing.others
    # Relative to the root, whose own end is no separator only where the root is "/".
    start = len(root) if root.endswith(os.sep) else len(root) + 1
    return FolderScan(sorted(path[start:] for path in paths), others, stamps)


def scan_url(url: str, extensions: frozenset[str] = EXTENSIONS) -> FolderScan:
    """All images below a folder behind a URL, by the rules of ``scan_folder``; it has no stamps.

    Raises:
        ValueError, OSError: see ``url_handlers.files_below``.
    """
    from dinoengine.utils.url_handlers import files_below

    shown = [path for path in files_below(url) if not any(part.startswith(".") for part in path.split("/"))]
    others = Counter(os.path.splitext(path)[1].lower() for path in shown if not is_image(path, extensions))
    return FolderScan(sorted(path for path in shown if is_image(path, extensions)), others, [])


def unchanged(root: str, folders: Sequence[str], stamps: Sequence[int]) -> bool:
    """Whether each folder below ``root`` is there and last changed when its stamp says."""
    parts = [range(first, len(folders), _NUM_THREADS) for first in range(_NUM_THREADS)]

    def part_unchanged(part: range) -> bool:
        return all(_stamp(os.path.join(root, folders[i])) == stamps[i] for i in part)

    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return all(threads.map(part_unchanged, parts))


def _stamp(folder: str) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _list(folder: str, extensions: frozenset[str]) -> _Listing:
    listing = _Listing([], [], Counter())
    with os.scandir(folder) as entries:
        # Sorted, so that a folder with two names (a link) is always taken under the same one.
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                listing.folders.append(entry.path)
            elif is_image(entry.name, extensions):
                listing.images.append(entry.path)
            else:
                listing.others[os.path.splitext(entry.name)[1].lower()] += 1
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link that leads to itself is as dead as one that leads nowhere


def _naming(work: Callable[[str], Result]) -> Callable[[str], Result]:
    """``work`` on a folder, whose error says what was being done."""

    def named(folder: str) -> Result:
        try:
            return work(folder)
        except OSError as error:
            problem = f"A folder of images cannot be listed ({error.strerror}); make it readable or move it away"
            raise OSError(error.errno, problem, folder) from error

    return named
