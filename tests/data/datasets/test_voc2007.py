from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from dinoengine.data import VOC2007, ImageDataset, build_dataset, build_datasets
from dinoengine.data.datasets.voc2007 import CLASSES
from tests.voc import draw_labels, write_voc_split

LABELS = draw_labels(6, seed=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    write_voc_split(root, "trainval", LABELS)
    write_voc_split(root, "test", draw_labels(3, seed=1), first=6)
    return root


def _list(root: Path, name: str, split: str = "trainval") -> Path:
    return root / "ImageSets" / "Main" / f"{name}_{split}.txt"


def test_labels_are_what_the_files_say(root: Path) -> None:
    dataset = build_dataset(f"voc2007:root={root}:split=trainval")
    assert len(dataset) == 6
    assert dataset.multi_label_class_names == list(CLASSES)
    assert {dataset.multi_label(i).dtype for i in range(6)} == {np.dtype(np.int8)}  # type: ignore[union-attr]
    assert np.array_equal(np.stack([dataset.multi_label(i) for i in range(6)]), LABELS)  # type: ignore[arg-type]
    assert {-1, 0, 1} == set(LABELS.flatten().tolist())
    assert (dataset.class_names, dataset.label(0), dataset[0].label) == (None, None, None)


def test_each_image_stands_beside_its_labels(root: Path) -> None:
    """Row k of an image is white where it shows class k; JPEG blurs a little."""
    dataset = VOC2007(str(root), "test")
    assert [Path(dataset.describe(i)).name for i in range(3)] == ["000006.jpg", "000007.jpg", "000008.jpg"]
    for i in range(3):
        rows = np.asarray(dataset.load(i).convert("L")).mean(axis=1)
        known = dataset.multi_label(i) != 0
        assert np.array_equal((rows > 120)[known], (dataset.multi_label(i) == 1)[known])


def test_images_are_in_the_order_of_the_files_whatever_that_of_the_folder(root: Path) -> None:
    for name in CLASSES:
        lines = _list(root, name).read_text().splitlines()
        _list(root, name).write_text("\n".join(reversed(lines)) + "\n\n")
    dataset = VOC2007(str(root))
    assert dataset.describe(0).endswith("000005.jpg")
    assert np.array_equal(dataset.multi_label(0), LABELS[5])


def test_the_root_may_stand_without_its_key_and_a_worker_may_have_a_copy(root: Path) -> None:
    dataset = build_dataset(f"voc2007:{root}:split=test")
    copy: ImageDataset = pickle.loads(pickle.dumps(dataset))
    assert copy.describe(1) == dataset.describe(1)
    assert np.array_equal(copy.multi_label(1), dataset.multi_label(1))  # type: ignore[arg-type]


def test_two_splits_are_one_multi_label_dataset(root: Path) -> None:
    joined = build_datasets([f"voc2007:{root}:split=trainval", f"voc2007:{root}:split=test"])
    assert len(joined) == 9
    assert joined.multi_label_class_names == list(CLASSES)
    assert np.array_equal(joined.multi_label(7), draw_labels(3, seed=1)[1])  # type: ignore[arg-type]


def test_another_split(root: Path) -> None:
    with pytest.raises(ValueError, match=r"splits train, val, trainval, test; got 'tests' \(did you mean 'test'\?\)"):
        VOC2007(str(root), "tests")


def test_the_folder_above_is_not_the_root(root: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*/VOCdevkit/JPEGImages\. The root .* is the folder VOC2007"
    ):
        VOC2007(str(root.parent))


def test_missing_split_files_are_counted_and_named(root: Path) -> None:
    _list(root, "cow").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of them are missing: .*cow_trainval\.txt\."):
        VOC2007(str(root))
    with pytest.raises(FileNotFoundError, match=r"20 of them are missing: .*aeroplane_val\.txt, .* and 15 more"):
        VOC2007(str(root), "val")


def test_missing_images_are_counted_and_named(root: Path) -> None:
    for i in (1, 4):
        (root / "JPEGImages" / f"00000{i}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 6 images .*_trainval\.txt names .*: 000001, 000004\."):
        VOC2007(str(root))
    assert len(VOC2007(str(root), "test")) == 3


def test_a_class_that_lacks_an_image(root: Path) -> None:
    lines = _list(root, "dog").read_text().splitlines(keepends=True)
    _list(root, "dog").write_text("".join(lines[:-1]))
    with pytest.raises(
        ValueError, match=r"dog_trainval\.txt and .*aeroplane_trainval\.txt .* one of them has 000005\."
    ):
        VOC2007(str(root))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000002  2", r"cat_trainval\.txt, line 3: expected the name of an image and 1, 0 or -1, got '000002  2'"),
        ("000002", r"line 3: expected .* got '000002'"),
        ("000002 1 1", r"line 3: expected .* got '000002 1 1'"),
        ("000001 -1", r"line 3: the image 000001 is named a second time"),
    ],
)
def test_a_wrong_line_is_shown(root: Path, line: str, message: str) -> None:
    lines = _list(root, "cat").read_text().splitlines()
    lines[2] = line
    _list(root, "cat").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        VOC2007(str(root))


def test_an_empty_split_file(root: Path) -> None:
    _list(root, "sofa").write_text("\n")
    with pytest.raises(ValueError, match=r"sofa_trainval\.txt names no image"):
        VOC2007(str(root))
