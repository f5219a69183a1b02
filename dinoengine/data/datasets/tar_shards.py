"""Images in tar files: webdataset's shards, and the tar per class of ImageNet-22k."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dinoengine.data.array_file import read_arrays, write_arrays
from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.file_index import cache_folder
from dinoengine.data.fingerprint import fingerprint
from dinoengine.data.folder_scan import is_image
from dinoengine.data.path_table import PathTable
from dinoengine.data.tar_index import expand_braces, read_member, tar_members
from dinoengine.utils.file_io import is_url, local_folder, local_path
from dinoengine.utils.printable import printable

_LABEL_ENDING = ".cls"
_NO_LABEL = -1
_MAX_LABEL = 9_999_999
_NUM_THREADS = 8
_VERSION = 1

logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    names: list[str]
    places: list[tuple[int, int]]
    labels: list[int]


class TarImages(ImageDataset):
    """Images by index in plain tar files, in the order of the files and of their members."""

    def __init__(self, shards: list[str]) -> None:
        """
        Args:
            shards: paths; the index of their members is kept while none changes in size or time.

        Raises:
            FileNotFoundError: if one is missing; says how many and the first five.
            ValueError: if one is no plain tar, ends early, or none holds an image.
        """
        self.shards = shards
        if missing := [shard for shard in shards if not os.path.isfile(shard)]:
            listed = "\n".join(f"  {printable(shard)}{_why_missing(shard)}" for shard in missing[:5])
            raise FileNotFoundError(f"{len(missing)} of {len(shards)} shards are missing. The first of them:\n{listed}")
        arrays, self._index_file = _index(shards)
        self._names = PathTable(arrays["names"], arrays["ends"])
        self._shard_of: np.ndarray = arrays["shard_of"]
        self._places: np.ndarray = arrays["places"]
        self.told: np.ndarray = arrays["labels"]
        if not len(self._names):
            raise ValueError(f"The {len(shards)} shard(s) hold no image, the first of them is {shards[0]}.")

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Any:
        """
        Raises:
            UnreadableImageError: if the member is no image; names shard and member.
            OSError: if the shard cannot be read.
        """
        offset, size = self._places[index]
        data = read_member(self.shards[self._shard_of[index]], int(offset), int(size))
        return self.read_bytes(data, self.describe(index))

    def fingerprint(self) -> str:
        labels = self.labels() if self.has_labels else None
        return fingerprint(self._names.data, self._names.ends, labels, *(self.class_names or ()))

    @property
    def index_files(self) -> list[str]:
        return [] if self._index_file is None else [self._index_file]

    def describe(self, index: int) -> str:
        return f"{self.shards[self._shard_of[index]]}/{self._names[index]}"


@DATASET_REGISTRY.register("wds")
class WebDataset(TarImages):
    """``wds:/p/shard-{000..099}.tar``: shards of webdataset, read by index; ``*`` and ``?`` work as well.

    Of URLs ``{000..099}`` works everywhere, and ``*`` where folders can be listed: not over http.

    A sample is the members with one name up to the first dot; its image is the one with the ending of an image, its label
    the whole number in its ``.cls``. There are labels if all samples have one. Shards behind URLs are fetched into iopath's
    cache once.
    """

    def __init__(self, shards: str) -> None:
        paths = [path for pattern in expand_braces(os.path.expanduser(shards)) for path in _matching(pattern)]
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            local = list(threads.map(_fetched, paths))
        super().__init__(local)
        if self.told.min() >= 0:
            self.class_names = [str(number) for number in range(int(self.told.max()) + 1)]

    def label(self, index: int) -> int | None:
        return None if self.class_names is None else int(self.told[index])

    def labels(self) -> np.ndarray:
        return super().labels() if self.class_names is None else self.told


@DATASET_REGISTRY.register("ImageNet22k")
class ImageNet22k(TarImages):
    """``ImageNet22k:root=/data``: a plain tar of images per class, ``<class>.tar``, as the published code has them.

    ``extra``, a folder of index files, is accepted and not needed: the tars say what they hold.
    """

    def __init__(self, root: str, extra: str = "") -> None:
        self.root, self.extra = local_folder(root), extra
        shards = sorted(glob.glob(os.path.join(glob.escape(self.root), "*.tar")))
        if not shards:
            raise FileNotFoundError(f"ImageNet22k has a file <class>.tar per class, and {self.root} has none.")
        super().__init__(shards)
        self.class_names = [os.path.basename(shard).removesuffix(".tar") for shard in shards]

    def label(self, index: int) -> int | None:
        return int(self._shard_of[index])

    def labels(self) -> np.ndarray:
        return self._shard_of


def _why_missing(shard: str) -> str:
    if os.path.isdir(shard):
        return " (a folder; the shards in it are wds:.../*.tar)"
    return " (no file matches)" if glob.has_magic(shard) else ""


def _matching(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern)) or [pattern]
    if "*" not in pattern:  # the "?" of a URL begins its query
        return [pattern]
    from dinoengine.utils.url_handlers import urls_matching

    return urls_matching(pattern) or [pattern]


def _fetched(path: str) -> str:
    try:
        return os.path.abspath(local_path(path))
    except FileNotFoundError:
        return path  # to be counted with those that are missing


def _index(shards: list[str]) -> tuple[dict[str, np.ndarray], str | None]:
    """(the arrays, the file that keeps them if one does)."""
    facts = {"version": _VERSION, "shards": [[path, (s := os.stat(path)).st_size, s.st_mtime_ns] for path in shards]}
    key = hashlib.sha256("\0".join(shards).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    kept = os.path.join(cache_folder(), "index", f"{key}.tars")
    try:
        content = read_arrays(kept)
        if content.facts == facts:
            return content.arrays, kept
    except (OSError, ValueError):
        pass  # there is none that is whole
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        found = list(threads.map(_images_of, shards))
    names = PathTable.of(name for shard in found for name in shard.names)
    arrays = {
        "names": names.data,
        "ends": names.ends,
        "shard_of": np.repeat(np.arange(len(found), dtype=np.int32), [len(shard.names) for shard in found]),
        "places": np.array([place for shard in found for place in shard.places], dtype=np.int64).reshape(-1, 2),
        "labels": np.array([label for shard in found for label in shard.labels], dtype=np.int32),
    }
    try:
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        write_arrays(kept, facts, arrays)
        return read_arrays(kept).arrays, kept
    except OSError as error:
        logger.warning(f"The index of {len(shards)} shards cannot be kept in {kept} ({error.strerror}).")
        return arrays, None


def _images_of(shard: str) -> _Found:
    found, labels, keys = _Found([], [], []), {}, []
    for member in tar_members(shard):
        folder, _, name = member.name.rpartition("/")
        key = f"{folder}/{name.partition('.')[0]}"
        if is_image(name):
            found.names.append(member.name)
            found.places.append((member.offset, member.size))
            keys.append(key)
        elif name[len(name.partition(".")[0]) :] == _LABEL_ENDING:
            text = read_member(shard, member.offset, member.size).decode("ascii", "replace").strip()
            # There is a class for each number up to the highest, and their names are made.
            if not text.isdigit() or len(text) > len(str(_MAX_LABEL)) or int(text) > _MAX_LABEL:
                raise ValueError(
                    f"{shard}/{member.name} must hold a whole number up to {_MAX_LABEL:,}, the label; got {text[:40]!r}."
                )
            labels[key] = int(text)
    found.labels.extend(labels.get(key, _NO_LABEL) for key in keys)
    return found
