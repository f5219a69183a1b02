"""The index files in the folder ``extra`` of the published code: what they say, and how they are written.

``entries-<SPLIT>.npy`` has a record per image, actual_index, class_index (both <u4), class_id and class_name (texts), and
no name of a file: it follows from the class and the number, as ``image_name`` says.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dinoengine.data.folder_scan import is_image
from dinoengine.utils.file_writing import atomic_write

NO_CLASS = int(np.iinfo(np.uint32).max)
_ROWS_AT_ONCE = 10_000


class Listed(NamedTuple):
    """The images that the files list.

    Attributes:
        numbers: [images] uint32: actual_index.
        labels: [images] int32; None without classes.
        class_ids, class_titles: by label; None without classes.
        own_names: whether images are named after their class, see ``image_name``.
        ending: of every file name.
    """

    split: str
    numbers: np.ndarray
    labels: np.ndarray | None
    class_ids: list[str] | None
    class_titles: list[str] | None
    own_names: bool
    ending: str

    def path(self, index: int) -> str:
        """Relative to the folder of the split."""
        class_id = "" if self.labels is None or self.class_ids is None else self.class_ids[self.labels[index]]
        return image_name(self.split, class_id, int(self.numbers[index]), self.own_names) + self.ending


def image_name(split: str, class_id: str, number: int, own_names: bool) -> str:
    """Path of an image in its split, without ending: after its class, or (``own_names`` False) as ILSVRC calls it."""
    name = f"{class_id}_{number}" if own_names else f"ILSVRC2012_{split.lower()}_{number:08d}"
    return os.path.join(class_id, name) if class_id else name


def is_there(extra: str, split: str) -> bool:
    """Whether the files of a split are there; those of TEST have no classes."""
    return all(map(os.path.isfile, files_of(extra, split)))


def is_begun(extra: str, split: str) -> bool:
    """Whether the first of them is there, which names the images."""
    return os.path.isfile(files_of(extra, split)[0])


def files_of(extra: str, split: str) -> list[str]:
    """Paths of the files of a split, entries first."""
    return list(_paths(extra, split)[: 1 if split == "TEST" else 3])


def num_listed(extra: str, split: str) -> int | None:
    """How many images the files list; None if they cannot be read."""
    try:
        return len(_load(files_of(extra, split)[0]))
    except (ValueError, TypeError, OSError):  # TypeError: an array without axes
        return None


def read(extra: str, split: str, folder: str) -> Listed:
    """
    Args:
        folder: of the images of the split.

    Raises:
        ValueError: if a file is damaged or they do not belong together.
        FileNotFoundError: if the first or last image that they list is not in the folder.
    """
    entries_path, ids_path, titles_path = _paths(extra, split)
    entries = _load(entries_path)
    if entries.ndim != 1 or not len(entries) or not {"actual_index", "class_index"} <= set(entries.dtype.names or ()):
        raise ValueError(f"{entries_path} must have records with actual_index and class_index, got {entries.dtype}.")
    # Two columns of 4 bytes; the records have texts as well, in all half a gigabyte for ImageNet-1k.
    numbers = np.array(entries["actual_index"], dtype=np.uint32)
    labels, class_ids, titles = None, None, None
    if split != "TEST":
        labels = np.array(entries["class_index"]).astype(np.int64)
        class_ids, titles = [str(v) for v in _load(ids_path)], [str(v) for v in _load(titles_path)]
        if len(class_ids) != len(titles) or labels.max() >= len(class_ids) or len(set(class_ids)) < len(class_ids):
            raise ValueError(
                f"{ids_path} ({len(class_ids)} names, {len(set(class_ids))} different), {titles_path} ({len(titles)}) and "
                f"{entries_path} (classes up to {labels.max()}) do not belong together. Remove them; they are not needed."
            )
        labels = labels.astype(np.int32)
    listed = Listed(split, numbers, labels, class_ids, titles, True, "")
    for own_names in (True, False) if class_ids else (False,):
        listed = listed._replace(own_names=own_names)
        if ending := _ending(folder, listed.path(0)):
            listed = listed._replace(ending=ending)
            if os.path.isfile(os.path.join(folder, listed.path(len(numbers) - 1))):
                return listed
    raise FileNotFoundError(
        f"{entries_path} lists {len(numbers)} images such as {listed.path(0)} and {listed.path(len(numbers) - 1)}, of "
        f"which the first or last is not in {folder}. Remove entries-{split}.npy to have the "
        "folder scanned, or name its own extra=."
    )


def write(
    extra: str,
    split: str,
    num_images: int,
    paths: Iterable[str],
    labels: np.ndarray | None,
    class_ids: list[str],
    class_titles: list[str],
) -> list[str]:
    """Write the files of a split; see ``ImageNet.dump_extra``."""
    entries_path, ids_path, titles_path = _paths(extra, split)
    kind = np.dtype(
        [
            ("actual_index", "<u4"),
            ("class_index", "<u4"),
            ("class_id", f"<U{max(map(len, class_ids), default=1)}"),
            ("class_name", f"<U{max(map(len, class_titles), default=1)}"),
        ]
    )
    records = _records(split, paths, labels, class_ids, class_titles)
    os.makedirs(extra, exist_ok=True)
    with atomic_write(entries_path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (num_images,)}
        np.lib.format.write_array_header_1_0(file, header)
        while rows := list(itertools.islice(records, _ROWS_AT_ONCE)):
            file.write(np.array(rows, dtype=kind).data)
    if split == "TEST":
        return [entries_path]
    for path, names in ((ids_path, class_ids), (titles_path, class_titles)):
        with atomic_write(path) as file:
            np.save(file, np.array(names, dtype=np.str_), allow_pickle=False)
    return [entries_path, ids_path, titles_path]


def read_labels(path: str) -> dict[str, str]:
    """Class id -> readable name, of lines ``id,name``.

    Raises:
        ValueError: for a line without a comma or a class that is named twice.
    """
    titles: dict[str, str] = {}
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        for row in rows:
            if not row:
                continue
            if len(row) < 2 or row[0] in titles:
                problem = "is named a second time" if row[0] in titles else "has no name"
                raise ValueError(f"{path}, line {rows.line_num}: class {row[0]!r} {problem}; expected lines id,name.")
            titles[row[0]] = ",".join(row[1:]).strip()
    return titles


def _records(
    split: str, paths: Iterable[str], labels: np.ndarray | None, class_ids: list[str], class_titles: list[str]
) -> Iterator[tuple[int, int, str, str]]:
    schemes: set[tuple[bool, str]] = set()
    for i, path in enumerate(paths):
        label = NO_CLASS if labels is None else int(labels[i])
        class_id, title = ("", "") if labels is None else (class_ids[label], class_titles[label])
        stem, ending = os.path.splitext(path)
        digits = stem.rpartition("_")[2]
        number = int(digits) if digits.isascii() and digits.isdigit() else NO_CLASS
        fits = [own for own in (True, False) if image_name(split, class_id, number, own) == stem]
        schemes |= {(own, ending) for own in fits}
        if not fits or number >= NO_CLASS or len(schemes) > 1:
            raise ValueError(
                f"Index files of the published code say the class and number of an image, so all images must be called "
                f"<class>/<class>_<number>{ending}, or those of ILSVRC its own names, with one ending; {path} is not. "
                "dinoengine needs no such files."
            )
        yield number, label, class_id, title


def _paths(extra: str, split: str) -> tuple[str, str, str]:
    entries, ids, titles = (
        os.path.join(extra, f"{kind}-{split}.npy") for kind in ("entries", "class-ids", "class-names")
    )
    return entries, ids, titles


def _load(path: str) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array that can be read ({error}). Remove it, and it is not needed.") from error


def _ending(folder: str, stem: str) -> str:
    """The ending of the image of this name; empty if there is none."""
    parent, name = os.path.split(os.path.join(folder, stem))
    if not os.path.isdir(parent):
        return ""
    with os.scandir(parent) as entries:
        found = sorted(e.name for e in entries if os.path.splitext(e.name)[0] == name and is_image(e.name))
    return os.path.splitext(found[0])[1] if found else ""
