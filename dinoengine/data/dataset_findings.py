"""What a check of a dataset found, by name; the manifest and the quarantine list that come of it."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from dinoengine.data.dataset_check import NOT_IN_A_GROUP, Duplicates, Inspected, Leaks
from dinoengine.data.inspection import kind_of
from dinoengine.data.quarantine import write_quarantine
from dinoengine.utils.file_writing import atomic_write

BAD, LEAKS, NEAR_LEAKS = "bad", "leaks", "near-leaks"
DUPLICATES, NEAR_DUPLICATES = "duplicates", "near-duplicates"
BLANK, TINY, HUGE = "blank", "tiny", "huge"
NAMES = (BAD, LEAKS, NEAR_LEAKS, DUPLICATES, NEAR_DUPLICATES, BLANK, TINY, HUGE)


class Limits(NamedTuple):
    """``tiny`` is a shorter side of fewer than ``min_side_px``, ``huge`` more than ``max_pixels`` in all."""

    min_side_px: int = 32
    max_pixels: int = 50_000_000


class Finding(NamedTuple):
    """Images of which the same is to be said.

    Attributes:
        name: one of NAMES.
        meaning: what they are and what comes of it.
        indices: in the dataset, rising; of duplicates all but the first of each group.
    """

    name: str
    meaning: str
    indices: np.ndarray


def findings_of(inspected: Inspected, duplicates: Duplicates, leaks: Leaks | None, limits: Limits) -> list[Finding]:
    """One for each of NAMES, empty ones included; without those about leaks where nothing was compared with."""
    found = [
        Finding(
            BAD,
            "cannot be read; training replaces each by another image, an evaluation ends with an error",
            np.array(sorted(inspected.causes), dtype=np.int64),
        )
    ]
    if leaks is not None:
        found += [
            Finding(
                LEAKS,
                "the other dataset has the same pixels; results on it are too good",
                np.array(sorted(leaks.exact), dtype=np.int64),
            ),
            Finding(
                NEAR_LEAKS,
                "the other dataset has an image that looks alike; look at the pairs",
                np.array(sorted(leaks.near), dtype=np.int64),
            ),
        ]
    near = duplicates.extra(duplicates.near_group)
    exact = duplicates.extra(duplicates.exact_group)
    return [
        *found,
        Finding(DUPLICATES, "the pixels of an earlier image; they count twice in training", exact),
        Finding(
            NEAR_DUPLICATES,
            "look like an earlier image (copies that were scaled, compressed or brightened, frames of a film); exact "
            "duplicates are not counted again",
            np.setdiff1d(near, exact),
        ),
        Finding(BLANK, "show nothing: all pixels have nearly the same grey", inspected.blank()),
        Finding(
            TINY,
            f"shorter side below {limits.min_side_px} pixels; crops of them are mostly enlargement",
            inspected.smaller_than(limits.min_side_px),
        ),
        Finding(
            HUGE,
            f"more than {limits.max_pixels:,} pixels; slow to decode, and their crops show little of the scene",
            inspected.larger_than(limits.max_pixels),
        ),
    ]


def save_quarantine(file: str, inspected: Inspected, found: list[Finding], names: Collection[str]) -> list[str]:
    """Write the images of the findings of these names as a list that DATASETS.QUARANTINE takes.

    Returns:
        Names that such a list cannot hold; see ``quarantine.write_quarantine``.
    """
    describe = inspected.dataset.describe
    return write_quarantine(
        file,
        ((f"{f.name}: {f.meaning}", (describe(i) for i in f.indices.tolist())) for f in found if f.name in names),
    )


def save_manifest(
    file: str, inspected: Inspected, duplicates: Duplicates, leaks: Leaks | None, other: Inspected | None
) -> None:
    """Write a table of the images, a row each, as CSV.

    Where images are files ``list:<file>`` is a dataset of them (the bad ones included); of members of shards it is a table
    to read, which no dataset string takes.

    Columns: path (what the dataset calls it), label where there are labels, state ("good" or the kind of a bad one), cause,
    bytes, width, height, mode, content and look (hashes, hexadecimal), duplicate_group, near_group (numbers; empty: alone),
    leak and near_leak (the image of the other dataset).
    """
    has_labels = inspected.dataset.class_names is not None
    head = ["path", *(["label"] if has_labels else []), "state", "cause", "bytes", "width", "height", "mode"]
    head += ["content", "look", "duplicate_group", "near_group", "leak", "near_leak"]
    with atomic_write(file) as data:
        writer = csv.writer(codecs.getwriter("utf-8")(data, "surrogateescape"))
        writer.writerow(head)
        writer.writerows(_rows(inspected, duplicates, leaks or Leaks(), other, has_labels))


def _rows(
    inspected: Inspected, duplicates: Duplicates, leaks: Leaks, other: Inspected | None, has_labels: bool
) -> Iterator[list[object]]:
    dataset, class_names = inspected.dataset, inspected.dataset.class_names or []

    def partner(index: int | None) -> str:
        return "" if index is None or other is None else other.dataset.describe(index)

    for index, row in enumerate(inspected.rows):
        cells: list[object] = [dataset.describe(index)]
        if has_labels:
            label = dataset.label(index)
            cells.append("" if label is None else class_names[label])
        if row["is_bad"]:
            cause = inspected.causes[index]
            yield [*cells, kind_of(cause), cause, row["num_bytes"] or "", *[""] * 9]
            continue
        cells += ["good", "", row["num_bytes"] or "", row["width"], row["height"], inspected.modes[row["mode"]]]
        cells += [row["content"].tobytes().hex(), f"{int(row['look']):016x}"]
        groups = (duplicates.exact_group[index], duplicates.near_group[index])
        cells += ["" if group == NOT_IN_A_GROUP else int(group) for group in groups]
        yield [*cells, partner(leaks.exact.get(index)), partner(leaks.near.get(index))]


def require_new(folder: str, *names: str) -> list[str]:
    """Paths of files to be made in a folder, which is made if missing.

    Raises:
        ValueError: if one is there: a training may be using it.
    """
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in names]
    if there := [path for path in paths if os.path.exists(path)]:
        raise ValueError(f"{there[0]} is there already; give another folder, or remove it if no run needs it.")
    return paths
