"""Findings by name, the manifest read back as a dataset, the quarantine list read back by training's reader."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from dinoengine.data import build_dataset
from dinoengine.data.dataset_check import find_duplicates, find_leaks, inspect_dataset
from dinoengine.data.dataset_findings import (
    NAMES,
    Limits,
    findings_of,
    require_new,
    save_manifest,
    save_quarantine,
)
from dinoengine.data.quarantine import read_quarantine
from tests.data.pictures import picture


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    train, test = tmp_path / "train", tmp_path / "test"
    for folder in (train / "a", train / "b", test / "a"):
        folder.mkdir(parents=True)
    picture(0).save(train / "a" / "0, with comma.png")
    picture(0).save(train / "a" / "1 same.bmp")
    picture(0).resize((150, 112)).save(train / "b" / "2 near.png")
    picture(1).save(train / "b" / "3 leak.png")
    picture(2).save(train / "b" / "4 near leak.png")
    Image.new("L", (20, 20)).save(train / "b" / "5 blank, tiny.png")
    (train / "b" / "6 bad.png").touch()
    picture(3).resize((500, 400)).save(train / "b" / "7 huge.png")
    picture(1).save(test / "a" / "x.bmp")
    picture(2).resize((90, 68)).save(test / "a" / "y.png")
    return train, test


def test_all_of_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = folders
    mine, other = (inspect_dataset(build_dataset(f"folder:{folder}"), 0) for folder in (train, test))
    duplicates, leaks = find_duplicates(mine, 4), find_leaks(mine, other, 4)
    found = findings_of(mine, duplicates, leaks, Limits(32, 150_000))
    assert [f.name for f in found] == list(NAMES)
    by_name = {f.name: f.indices.tolist() for f in found}
    assert by_name == {
        "bad": [6],
        "leaks": [3],
        "near-leaks": [4],
        "duplicates": [1],
        "near-duplicates": [2],
        "blank": [5],
        "tiny": [5],
        "huge": [7],
    }

    file = str(tmp_path / "manifest.csv")
    save_manifest(file, mine, duplicates, leaks, other)
    with open(file, encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["path"] for row in rows] == [mine.dataset.describe(i) for i in range(8)]
    assert [row["state"] for row in rows] == ["good"] * 6 + ["empty", "good"]
    assert rows[6]["cause"] == "the file is empty"
    assert (rows[2]["width"], rows[2]["height"], rows[2]["mode"]) == ("150", "112", "RGB")
    assert rows[0]["content"] == rows[1]["content"] != rows[2]["content"]
    assert [bool(row["duplicate_group"]) for row in rows] == [True, True] + [False] * 6
    assert [bool(row["near_group"]) for row in rows] == [True, True, True] + [False] * 5
    assert (rows[3]["leak"], rows[3]["near_leak"]) == (str(test / "a" / "x.bmp"), "")
    assert (rows[4]["leak"], rows[4]["near_leak"]) == ("", str(test / "a" / "y.png"))
    again = build_dataset(f"list:{file}")
    assert [again.path(i) for i in range(8)] == [mine.dataset.path(i) for i in range(8)]
    assert [again.label(i) for i in range(8)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert again.class_names == ["a", "b"]

    file = str(tmp_path / "quarantine.txt")
    assert save_quarantine(file, mine, found, ("bad", "leaks", "tiny", "blank")) == []
    assert read_quarantine(file) == {mine.dataset.describe(i) for i in (3, 5, 6)}
    assert Path(file).read_text().startswith("# bad: cannot be read")


def test_without_another_dataset_nothing_is_said_of_leaks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    mine = inspect_dataset(build_dataset("synthetic:num_images=5:num_classes=2:size=10"), 0)
    found = findings_of(mine, find_duplicates(mine, 0), None, Limits())
    assert [f.name for f in found] == [name for name in NAMES if "leak" not in name]
    assert len(found[-2].indices) == len(mine.rows)  # tiny
    save_manifest(str(tmp_path / "manifest.csv"), mine, find_duplicates(mine, 0), None, None)
    with open(tmp_path / "manifest.csv", newline="") as text:
        row = next(csv.DictReader(text))
    assert (row["label"], row["bytes"], row["leak"]) == (mine.dataset.class_names[mine.dataset.label(0)], "", "")  # type: ignore[index]


def test_files_that_a_run_may_be_using_are_not_replaced(tmp_path: Path) -> None:
    folder = str(tmp_path / "new" / "folder")
    assert require_new(folder, "a", "b") == [f"{folder}/a", f"{folder}/b"]
    Path(folder, "b").touch()
    with pytest.raises(ValueError, match=f"{folder}/b is there already; give another folder"):
        require_new(folder, "a", "b")
