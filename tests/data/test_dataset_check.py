"""A whole dataset: columns, sums, groups and leaks, each against what was put there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dinoengine.data import ImageFolder, Synthetic, dataset_check
from dinoengine.data.dataset_check import (
    NOT_IN_A_GROUP,
    Inspected,
    cores,
    find_duplicates,
    find_leaks,
    inspect_dataset,
)
from tests.data.pictures import picture


def _inspect(folder: Path) -> Inspected:
    return inspect_dataset(ImageFolder(str(folder)), 0)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    """0..5 differ; 6 = 0, 7 and 8 look like 1; 9, 10 blank and alike; 11 bad; 12 grey."""
    folder = tmp_path_factory.mktemp("train")
    for i in range(6):
        picture(i).save(folder / f"{i:02d}.png")
    picture(0).save(folder / "06.bmp")
    picture(1).resize((100, 75)).save(folder / "07.png")
    picture(1).save(folder / "08.jpg", quality=50)
    for i in (9, 10):
        Image.new("RGB", (60, 40), (i, i, i)).save(folder / f"{i:02d}.png")
    (folder / "11.png").write_bytes(b"")
    picture(6).convert("L").save(folder / "12.png")
    return _inspect(folder)


def test_columns_are_those_of_the_images(train: Inspected) -> None:
    assert train.num_good == 12
    assert train.causes == {11: "the file is empty"}
    assert train.kinds() == {"empty": 1}
    assert train.rows["is_bad"].tolist() == [i == 11 for i in range(13)]
    assert train.rows["width"].tolist() == [200] * 7 + [100, 200, 60, 60, 0, 200]
    assert train.rows["height"].tolist() == [150] * 7 + [75, 150, 40, 40, 0, 150]
    assert train.num_of_mode() == {"RGB": 11, "L": 1}
    sizes = [os.path.getsize(train.dataset.path(i) or "") for i in range(13)]
    assert train.rows["num_bytes"].tolist() == sizes
    assert train.decode_seconds > 0


def test_small_large_and_blank(train: Inspected) -> None:
    assert train.smaller_than(75).tolist() == [9, 10]
    assert train.smaller_than(76).tolist() == [7, 9, 10]
    assert train.larger_than(200 * 150 - 1).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 12]
    assert train.larger_than(200 * 150).tolist() == []
    assert train.blank().tolist() == [9, 10]


def test_every_good_image_counts_the_same_for_mean_and_std(train: Inspected) -> None:
    arrays = [np.asarray(train.dataset.load(i).convert("RGB")) / 255 for i in range(13) if i != 11]
    mean = np.mean([a.mean((0, 1)) for a in arrays], axis=0)
    square = np.mean([(a**2).mean((0, 1)) for a in arrays], axis=0)
    np.testing.assert_allclose(train.mean, mean)
    np.testing.assert_allclose(train.std, np.sqrt(square - mean**2))


def test_duplicates(train: Inspected) -> None:
    found = find_duplicates(train, 4)
    assert found.is_complete
    assert [i for i, group in enumerate(found.exact_group) if group != NOT_IN_A_GROUP] == [0, 6]
    assert found.exact_group[0] == found.exact_group[6]
    near = found.near_group
    assert [i for i, group in enumerate(near) if group != NOT_IN_A_GROUP] == [0, 1, 6, 7, 8]  # not the blank ones
    assert near[0] == near[6] != near[1] == near[7] == near[8]
    assert found.extra(found.exact_group).tolist() == [6]
    assert found.extra(near).tolist() == [6, 7, 8]


def test_leaks(train: Inspected, tmp_path: Path) -> None:
    picture(40).save(tmp_path / "0.png")
    picture(2).save(tmp_path / "1.bmp")
    picture(3).resize((90, 68)).save(tmp_path / "2.png")
    Image.new("RGB", (60, 40), (9, 9, 9)).save(tmp_path / "3.png")
    Image.new("RGB", (61, 40), (9, 9, 9)).save(tmp_path / "4.png")
    leaks = find_leaks(train, _inspect(tmp_path), 4)
    assert leaks.exact == {2: 1, 9: 3}  # a blank one as well: it is the same image
    assert leaks.near == {3: 2}
    assert leaks.is_complete


def test_a_leak_of_the_same_hash_needs_no_distance(train: Inspected) -> None:
    copy = Inspected(train.dataset, train.rows.copy(), train.modes, {}, train.mean, train.std, 0.0)
    copy.rows["content"] = np.zeros(16, dtype=np.uint8).view("V16")  # other pixels
    copy.rows["content"][0] = np.full(16, 1, dtype=np.uint8).view("V16")[0]
    leaks = find_leaks(train, copy, 0)
    assert leaks.exact == {}
    assert set(leaks.near) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 12}
    assert all(train.rows["look"][i] == train.rows["look"][j] for i, j in leaks.near.items())


def test_datasets_without_a_readable_image(tmp_path: Path, train: Inspected) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    bad = _inspect(tmp_path)
    assert bad.num_good == 0
    assert np.isfinite([*bad.mean, *bad.std, bad.decode_seconds]).all()
    assert set(find_duplicates(bad, 4).exact_group.tolist()) == {NOT_IN_A_GROUP}
    for leaks in (find_leaks(bad, train, 4), find_leaks(train, bad, 4)):
        assert (leaks.exact, leaks.near) == ({}, {})


@pytest.mark.slow
def test_processes_find_the_same() -> None:
    dataset, seen = Synthetic(num_images=70, size=24), []
    here, there = inspect_dataset(dataset, 0), inspect_dataset(dataset, 2, seen.append)
    assert np.array_equal(here.rows, there.rows)
    assert np.array_equal(here.mean, there.mean)
    assert seen == [32, 32, 6]


def test_a_process_that_dies_is_named_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: DataLoader[Any]) -> Any:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(DataLoader, "__iter__", die)
    with pytest.raises(RuntimeError, match=r"pid 7\) is killed .* out of memory: take fewer workers"):
        inspect_dataset(Synthetic(num_images=2, size=8), 0)


def test_a_row_is_small_and_there_is_a_core() -> None:
    assert dataset_check._ROW.itemsize <= 60
    assert cores() >= 1
