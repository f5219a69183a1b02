"""Images that a file lists."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import FileDataset
from dinoengine.data.fingerprint import fingerprint
from dinoengine.data.path_table import PathTable
from dinoengine.data.text_file import open_text
from dinoengine.utils.file_io import is_file, is_url, read_bytes
from dinoengine.utils.printable import printable
from dinoengine.utils.registry import suggest

_ENDINGS = (".txt", ".csv", ".parquet")
_LABEL = "label"
_NUM_SHOWN = 5
_NUM_THREADS = 16
# Of files behind URLs only so many are asked for beforehand, each a request.
_NUM_URLS_CHECKED = 100


class _Table(NamedTuple):
    """The names of all columns, and the values of those that were asked for; the others are empty."""

    names: list[str]
    columns: list[list[Any]]


@DATASET_REGISTRY.register("list")
class FileList(FileDataset):
    """``list:/p/files.txt``, ``list:/p/files.csv[:path=file][:label=class]``, ``list:/p/files.parquet[:...]``.

    A text file has one path per line. Of a table the column ``path`` is read, or the one that is named, and ``label`` if
    there is one: a text or number per image. Relative paths are relative to the folder of the file, or to ``root``. The
    list, the root and any entry may be a URL; images behind one are read anew each time.
    """

    def __init__(self, file: str, path: str = "path", label: str = "", root: str = "", check: bool = True) -> None:
        """
        Args:
            path, label: columns of a table; ``label`` empty: the column "label" if there is one.
            check: see now that every file is there, of those behind URLs 100; False: one that is not is a bad image when
                its turn comes.

        Raises:
            FileNotFoundError: if the list or an image is missing; says how many and the first five.
            ValueError: if the list has another ending, is no text, has no such column or two of them, no entry, an empty
                path or label, or pyarrow is missing, or what the protocol of a URL needs; says what to install.
            OSError: if a URL cannot be read.
        """
        self.file = _absolute(file)
        place = self.file.partition("?")[0] if is_url(file) else self.file  # a URL may have a query
        ending = os.path.splitext(place)[1].lower()
        if ending not in _ENDINGS:
            raise ValueError(f"A list of images ends with {', '.join(_ENDINGS)}; got {file!r}.")
        if not is_file(self.file):
            raise FileNotFoundError(f"The list of images {self.file} does not exist.")
        if ending == ".txt":
            if label or path != "path":
                raise ValueError(
                    f"{self.file} is a text with one path per line; path= and label= name columns of a table."
                )
            paths, labels = _lines(self.file), None
        else:
            read = _read_csv if ending == ".csv" else _read_parquet
            paths, labels = _paths_and_labels(self.file, read(self.file, {path, label or _LABEL}), path, label)
        if not paths:
            raise ValueError(f"{self.file} lists no image.")
        self.root = _absolute(root).rstrip("/") if root else os.path.dirname(place)
        self.file_labels = None
        if labels is not None:
            self.class_names = _in_order(set(labels))
            number = {name: i for i, name in enumerate(self.class_names)}
            self.file_labels = np.fromiter((number[name] for name in labels), dtype=np.int32, count=len(labels))
        self._paths = PathTable.of(paths)
        if check:
            self._require_files(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Absolute path or URL of the image at ``index``."""
        entry = self._paths[index]
        if is_url(entry):
            return entry
        entry = os.path.expanduser(entry)
        if self.root.startswith(("http://", "https://")) and not os.path.isabs(entry):
            entry = quote(entry)  # a file name may have characters that mean something in a URL
        return os.path.join(self.root, entry)

    def fingerprint(self) -> str:
        return fingerprint(self._paths.data, self._paths.ends, self.file_labels, *(self.class_names or ()))

    def _require_files(self, paths: Sequence[str]) -> None:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            full = [self.path(i) for i in range(len(paths))]
            far = [path for path in full if is_url(path)]
            checked = [path for path in full if not is_url(path)]
            checked += far[:: max(1, len(far) // _NUM_URLS_CHECKED)]
            missing = [path for path, there in zip(checked, threads.map(is_file, checked), strict=True) if not there]
        if missing:
            of_shards = all(map(_is_in_shard, missing[:_NUM_SHOWN]))
            shown = "\n".join(f"  {printable(path)}" for path in missing[:_NUM_SHOWN])
            raise FileNotFoundError(
                f"{len(missing)} of the {len(checked)} files that {self.file} lists are missing. Relative paths start at "
                f"{self.root} (key root=); with check=false missing files count as bad images. The first of them:\n{shown}"
                + ("\nThese are members of shards, which a list cannot name; take wds: itself." if of_shards else "")
            )


def _is_in_shard(path: str) -> bool:
    shard, ending, _ = path.partition(".tar/")
    return bool(ending) and os.path.isfile(f"{shard}.tar")


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


def _lines(path: str) -> list[str]:
    with open_text(path) as file:
        # Not splitlines(), which takes letters for ends of lines that names may have.
        return [line for line in file.read().removeprefix("\ufeff").split("\n") if line.strip()]


def _read_csv(path: str, wanted: set[str]) -> _Table:
    with open_text(path, "utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        try:
            names = [name.strip() for name in next(filter(None, rows), [])]  # empty lines count for nothing
            columns: list[list[Any]] = [[] for _ in names]
            read = [i for i, name in enumerate(names) if name in wanted]
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {len(row)} values, and there are {len(names)} columns: "
                        f"{', '.join(names)}. Put a value with a comma in quotes."
                    )
                for i in read:
                    columns[i].append(row[i])
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}. Is a quote not closed?") from error
    return _Table(names, columns)


def _read_parquet(path: str, wanted: set[str]) -> _Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Lists in parquet files need pyarrow: pip install 'dinoengine[parquet]'.") from error
    try:
        table = parquet.read_table(io.BytesIO(read_bytes(path)) if is_url(path) else path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error}.") from error
    columns = [table.column(i).to_pylist() if name in wanted else [] for i, name in enumerate(table.column_names)]
    return _Table(table.column_names, columns)


def _paths_and_labels(file: str, table: _Table, path: str, label: str) -> tuple[list[str], list[str] | None]:
    """The columns of these names; without labels if ``label`` is empty and none is called "label"."""
    names = table.names
    label = label or (_LABEL if _LABEL in names else "")
    for key, name in (("path", path), ("label", label)):
        if name and name not in names:
            remedy = f"Name another with {key}=."
            if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
                remedy = f"Columns are parted by commas, and these seem to be by {other!r}: save the table with commas."
            raise ValueError(
                f"{file} has no column {name!r}{suggest(name, names)}; its columns are {', '.join(names) or 'none'}. "
                f"{remedy}"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"{file} has {names.count(name)} columns {name!r}, so it is not clear which is meant; its columns are "
                f"{', '.join(names)}. Rename one, or name another with {key}=."
            )
    columns = dict(zip(names, table.columns, strict=True))
    for name in filter(None, (path, label)):
        if empty := [
            row for row, value in enumerate(columns[name], start=1) if value is None or not str(value).strip()
        ]:
            raise ValueError(f"{file}: column {name!r} is empty in {len(empty)} row(s), the first of them {empty[0]}.")
    return [str(value) for value in columns[path]], [str(v).strip() for v in columns[label]] if label else None


def _in_order(names: set[str]) -> list[str]:
    """Numbers by value, so that class 10 follows 9; other names by alphabet."""
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else sorted(names)
