"""Features of a dataset on disk: memory-mapped arrays with one row per image, an index, and what they were made with.

A finished store is a folder with ``meta.json``, ``index.jsonl`` and an array ``<token>.npy`` for each kind of token. While
it is being written it has another name, so what exists under its own name is complete.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch

import dinoengine
from dinoengine.data import ImageDataset
from dinoengine.evaluation.records import differing_settings, index_sha256
from dinoengine.utils import comm
from dinoengine.utils.file_writing import atomic_write, write_json
from dinoengine.utils.registry import UnknownNameError

META_FILE = "meta.json"
INDEX_FILE = "index.jsonl"
PARQUET_FILE = "index.parquet"
UNFINISHED_SUFFIX = ".unfinished"
_SETTINGS_FILE = "settings.json"
_DONE_FILE = "done.npy"


class _Arrays(dict[str, "np.memmap[Any, Any]"]):
    """Arrays of a store by kind of token; one that was not extracted is asked for often, and says how to get it."""

    def __init__(self, path: str, names: Iterable[str]) -> None:
        super().__init__({n: np.lib.format.open_memmap(os.path.join(path, f"{n}.npy"), mode="r") for n in names})
        self._path = path

    def __missing__(self, name: str) -> np.memmap[Any, Any]:
        raise UnknownNameError(
            f"{self._path} has no {name!r}; it has {', '.join(self)}. Extract again with other tokens into another folder, "
            f"e.g. tools/extract_features.py --tokens {','.join(dict.fromkeys((*self, name)))}, whose --help lists them."
        )


class FeatureStore:
    """A finished store, for reading.

    Attributes:
        meta: what the features are of and how they were made: "dataset", "num_images", "weights_sha256", "weights_file",
            "preprocessing", "extraction", "arrays", "class_names" and more.
        features: kind of token -> memory-mapped array, one row per image in the order of the dataset: "cls" and
            "mean_patch" [images, n * D], "patch" and "register" [images, tokens, n * D], n last blocks side by side.
        names: what the dataset calls each image: a path, or dataset and index.
        labels: [images] int64, or None for a dataset without labels.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            FileNotFoundError: if there is no finished store; says so if one has been begun.
        """
        meta_path = os.path.join(path, META_FILE)
        if not os.path.exists(meta_path):
            begun = os.path.exists(unfinished_path(path))
            raise FileNotFoundError(
                f"The features in {path} are not finished; run the extraction again with the same settings."
                if begun
                else f"There are no features in {path} (no {META_FILE}); tools/extract_features.py writes them."
            )
        with open(meta_path, encoding="utf-8") as file:
            self.meta: dict[str, Any] = json.load(file)
        self.features: dict[str, np.memmap[Any, Any]] = _Arrays(path, self.meta["arrays"])
        with open(os.path.join(path, INDEX_FILE), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        self.names: list[str] = [row["name"] for row in rows]
        has_labels = self.meta["class_names"] is not None
        self.labels = np.array([row["label"] for row in rows], dtype=np.int64) if has_labels else None

    def __len__(self) -> int:
        return int(self.meta["num_images"])


def unfinished_path(path: str) -> str:
    """Where a store lies while it is being written."""
    return path.rstrip("/" + os.sep) + UNFINISHED_SUFFIX


class StoreWriter:
    """Writes a store, possibly by several processes of one machine, possibly in several runs.

    Every process makes one with the same arguments. Rows may come in any order; which are done is on disk, so that a later
    run, also with another number of processes, does the others.

    Attributes:
        is_finished: whether the store was complete already, with these settings.
    """

    def __init__(
        self,
        path: str,
        dataset: ImageDataset,
        settings: Mapping[str, Any],
        arrays: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        overwrite: bool = False,
    ) -> None:
        """
        Args:
            path: of the finished store.
            settings: all that decides the values, JSON-serialisable.
            arrays: name -> (shape of a row, dtype).
            overwrite: replace what is there, finished or not.

        Raises:
            ValueError: if features with other settings are there, finished or not (says what differs), or something else,
                or another run is writing them.
            OSError: if the disk has no room for them.
        """
        self.path, self.dataset = path, dataset
        self.folder = unfinished_path(path)
        rows = {name: {"shape": [len(dataset), *shape], "dtype": dtype} for name, (shape, dtype) in arrays.items()}
        self.settings = {**settings, "index_sha256": index_sha256(dataset), "arrays": rows}
        if comm.get_local_size() != comm.get_world_size():
            raise ValueError("Features are written by processes of one machine, which share its memory of the files.")
        self._lock: IO[str] | None = None
        try:
            comm.on_main_process(lambda: self._prepare_or_explain(overwrite))
        except BaseException:
            self.close()
            raise
        self.is_finished = os.path.exists(path)
        if not self.is_finished:
            self._arrays = {name: self._open(f"{name}.npy") for name in arrays}
            self._done = self._open(_DONE_FILE)
            self._written: list[np.ndarray] = []

    def _open(self, name: str) -> np.memmap[Any, Any]:
        return np.lib.format.open_memmap(os.path.join(self.folder, name), mode="r+")

    def _prepare_or_explain(self, overwrite: bool) -> None:
        """``_prepare``, with the advice that an error of the file system lacks."""
        try:
            self._prepare(overwrite)
        except OSError as error:
            if error.strerror is None:  # one of ours
                raise
            where = os.path.dirname(os.path.abspath(self.path))
            raise ValueError(
                f"The features cannot be written to {self.path}: {error.strerror} ({error.filename or where}). Name a "
                f"place in a folder that you may write to and that has space, or change {where}."
            ) from error

    def _prepare(self, overwrite: bool) -> None:
        """Make or find the unfinished folder (ValueError: it cannot be used)."""
        for path, file in ((self.path, META_FILE), (self.folder, _SETTINGS_FILE)):
            if not os.path.lexists(path):
                continue
            if path == self.folder and not self._take_lock():
                raise ValueError(f"Another run is writing {path} now; wait for it, or end its processes.")
            settings_path = os.path.join(path, file)
            there = _settings_in(settings_path)
            if there is None:
                raise ValueError(f"{path} exists and holds no features; name another place.")
            if overwrite:
                shutil.rmtree(path)
                continue
            if different := differing_settings({key: there.get(key) for key in self.settings}, self.settings):
                lines = "\n  ".join(different)
                raise ValueError(
                    f"{path} holds features made with other settings (there, and now):\n  {lines}\n"
                    "Name another place, or replace them (--overwrite)."
                )
            return
        # Under a third name until it is complete: a folder with half of its files would be taken for a resumable one.
        fresh = self.folder + ".new"
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh)
        arrays = {f"{name}.npy": (a["shape"], a["dtype"]) for name, a in self.settings["arrays"].items()}
        arrays[_DONE_FILE] = ([len(self.dataset)], "bool")
        num_bytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
        with _room_for(num_bytes, fresh):
            for name, (shape, dtype) in arrays.items():
                array = os.path.join(fresh, name)
                np.lib.format.open_memmap(array, mode="w+", dtype=dtype, shape=tuple(shape)).flush()
                _allocate(array)
        write_json(os.path.join(fresh, _SETTINGS_FILE), self.settings)
        os.rename(fresh, self.folder)
        if not self._take_lock():
            raise ValueError(f"Another run has just begun to write {self.folder}.")

    def _take_lock(self) -> bool:
        """Whether no other run writes; it may have survived the command that started it. The lock ends with the process."""
        settings_path = os.path.join(self.folder, _SETTINGS_FILE)
        if not os.path.exists(settings_path):
            return True
        self._lock = open(settings_path, encoding="utf-8")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            return False
        return True

    def close(self) -> None:
        """Let another run write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def missing(self) -> list[int]:
        """Images whose rows are not done; on several processes ask before any of them writes."""
        images: list[int] = np.flatnonzero(~self._done).tolist()
        comm.synchronize()
        return images

    def write(self, indices: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Rows of these images, for each array; done at the next ``flush``."""
        for name, values in rows.items():
            self._arrays[name][indices] = values
        self._written.append(indices)

    def flush(self) -> None:
        """Bring rows to disk, and only then mark them as done."""
        for array in self._arrays.values():
            array.flush()
        for indices in self._written:
            self._done[indices] = True
        self._done.flush()
        self._written = []

    def add_parquet(self) -> None:
        """The index of a finished store as a table, for a store that was written without; every process calls it."""
        if not os.path.exists(os.path.join(self.path, PARQUET_FILE)):
            comm.on_main_process(lambda: _write_parquet(index_rows(self.dataset), self.path))

    def finish(self, parquet: bool = False, **more: Any) -> None:
        """Write the index and ``meta.json`` and give the store its name; every process calls it after its last row.

        Args:
            parquet: the index as a table as well (needs pyarrow).
            more: put into ``meta.json`` beside the settings.

        Raises:
            RuntimeError: if rows are missing.
        """
        self.flush()
        comm.synchronize()
        comm.on_main_process(lambda: self._publish(parquet, more))

    def _publish(self, parquet: bool, more: Mapping[str, Any]) -> None:
        if not self._done.all():
            raise RuntimeError(f"{int((~self._done).sum())} rows were never written; run the extraction again.")
        rows = index_rows(self.dataset)
        with atomic_write(os.path.join(self.folder, INDEX_FILE), "w") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        if parquet:
            _write_parquet(rows, self.folder)
        meta = {
            **self.settings,
            **more,
            "class_names": self.dataset.class_names,
            "software": {"dinoengine": dinoengine.__version__, "torch": torch.__version__},
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        write_json(os.path.join(self.folder, META_FILE), meta)
        # Renamed first: whatever moment this is killed at, what is there is complete or can be gone on with.
        os.rename(self.folder, self.path)
        os.remove(os.path.join(self.path, _DONE_FILE))
        os.remove(os.path.join(self.path, _SETTINGS_FILE))


@contextlib.contextmanager
def _room_for(num_bytes: int, folder: str) -> Iterator[None]:
    """Removes ``folder`` when the disk is too full to make its files, and says so (OSError)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        shutil.rmtree(folder)
        parent = os.path.dirname(os.path.abspath(folder))
        free = shutil.disk_usage(parent).free
        raise OSError(
            f"The features need {num_bytes / 2**20:.0f} MiB in {parent}, where {free / 2**20:.0f} MiB are free "
            f"({os.strerror(error.errno)}). Make room, name another place, or store less (float16, fewer tokens)."
        ) from error


def _allocate(path: str) -> None:
    """Give a file all of its blocks: a full disk is an error now, and no SIGBUS when a row is written to its memory map."""
    if not hasattr(os, "posix_fallocate"):
        return  # not on macOS; the file has its size, but may be sparse
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system cannot
                raise


def _settings_in(path: str) -> dict[str, Any] | None:
    """What a file of settings or ``meta.json`` says; None if it is none of ours."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"arrays", "index_sha256"} <= found.keys() else None


def index_rows(dataset: ImageDataset) -> list[dict[str, Any]]:
    """Name, label and class of each image; the last two are None without labels."""
    labels = [dataset.label(i) for i in range(len(dataset))]
    names = dataset.class_names
    return [
        {"name": dataset.describe(i), "label": label, "class": None if names is None or label is None else names[label]}
        for i, label in enumerate(labels)
    ]


def require_pyarrow() -> None:
    """
    Raises:
        ValueError: if pyarrow is missing; better before hours of work than after them.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(
            "A parquet index needs pyarrow (pip install 'dinoengine[parquet]'); index.jsonl is written in any case."
        ) from None


def _write_parquet(rows: Sequence[Mapping[str, Any]], folder: str) -> None:
    import pyarrow
    import pyarrow.parquet

    with atomic_write(os.path.join(folder, PARQUET_FILE)) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
