from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import ImageNet, build_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 2), value, dtype=np.uint8)).save(path)


TRAIN = ("n01/n01_10.png", "n01/n01_9.png", "n02/n02_1.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for value, name in enumerate(TRAIN):
        _image(root / "train" / name, value)
    (root / "labels.txt").write_text('n02,"crane, bird"\nn01,tench\nn03,crane\n')
    for folder in (root / "train", root / "train/n01", root / "train/n02"):
        os.utime(folder, (1_000_000, 1_000_000))
    return root


def _build(root: Path, split: str = "TRAIN", extra: Path | None = None) -> ImageNet:
    dataset = build_dataset(f"ImageNet:split={split}:root={root}" + (f":extra={extra}" if extra else ""))
    assert isinstance(dataset, ImageNet)
    return dataset


def _facts(dataset: ImageNet) -> list[tuple[str, int | None]]:
    return [(os.path.relpath(dataset.path(i), dataset.folder), dataset.label(i)) for i in range(len(dataset))]


def test_without_extra_and_without_val(root: Path) -> None:
    dataset = _build(root)
    assert _facts(dataset) == list(zip(TRAIN, [0, 0, 1], strict=True))
    assert (dataset.class_names, dataset.class_titles) == (["n01", "n02"], ["tench", "crane, bird"])
    assert int(np.asarray(dataset.load(2))[0, 0]) == 2
    with pytest.raises(
        FileNotFoundError, match=r"split VAL lies in the folder .*/val, which does not exist; splits in .*: TRAIN\."
    ):
        _build(root, "VAL")
    with pytest.raises(ValueError, match=r"splits TRAIN, VAL, TEST; got 'TRIAN' \(did you mean 'TRAIN'\?\)"):
        _build(root, "TRIAN")


def test_a_root_without_labels_file(root: Path) -> None:
    (root / "labels.txt").unlink()
    assert _build(root).class_titles == ["n01", "n02"]


def test_the_index_is_kept_in_extra_and_follows_the_folder(root: Path, tmp_path: Path, cache: Path) -> None:
    extra = tmp_path / "extra"
    first = _build(root, extra=extra)
    assert [p.name for p in extra.iterdir()] == ["TRAIN.index"]
    assert not list(cache.rglob("*.index"))
    assert _facts(_build(root, extra=extra)) == _facts(first)
    _image(root / "train/n02/n02_5.png")
    assert len(_build(root, extra=extra)) == 4


def test_an_extra_that_cannot_be_written_is_no_obstacle(root: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").touch()
    assert len(_build(root, extra=tmp_path / "file" / "extra")) == 3
    assert len(list(cache.rglob("*.index"))) == 1


def test_what_is_dumped_is_what_the_published_code_reads(root: Path, tmp_path: Path) -> None:
    extra = tmp_path / "elsewhere"
    files = _build(root).dump_extra(str(extra))
    assert [Path(f).name for f in files] == ["entries-TRAIN.npy", "class-ids-TRAIN.npy", "class-names-TRAIN.npy"]
    entries, ids, titles = (np.load(f, mmap_mode="r", allow_pickle=False) for f in files)
    # dtype and values by hand, from the published metadata files
    assert entries.dtype.descr == [
        ("actual_index", "<u4"),
        ("class_index", "<u4"),
        ("class_id", "<U3"),
        ("class_name", "<U11"),
    ]
    assert entries.tolist() == [(10, 0, "n01", "tench"), (9, 0, "n01", "tench"), (1, 1, "n02", "crane, bird")]
    assert (ids.tolist(), titles.tolist()) == (["n01", "n02"], ["tench", "crane, bird"])


def test_files_of_a_fork_say_what_the_images_are(root: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    scanned = _build(root)
    entries, _, _ = (Path(f) for f in scanned.dump_extra(str(extra)))
    read = _build(root, extra=extra)
    assert _facts(read) == _facts(scanned)
    assert (read.class_names, read.class_titles) == (scanned.class_names, scanned.class_titles)
    assert read.index is None
    np.save(entries, np.load(entries, allow_pickle=False)[[2, 0]])  # another order and fewer: no length is hard-coded
    read = _build(root, extra=extra)
    assert _facts(read) == [("n02/n02_1.png", 1), ("n01/n01_10.png", 0)]
    assert int(np.asarray(read.load(0))[0, 0]) == 2
    assert len(build_dataset(f"ImageNet:split=TRAIN:root={root}:extra={extra}:cached=false")) == 3


def test_the_names_of_ilsvrc_and_a_test_set_without_classes(root: Path, tmp_path: Path) -> None:
    for name in ("val/n01/ILSVRC2012_val_00000007.JPEG", "val/n02/ILSVRC2012_val_00000003.JPEG"):
        _image(root / name)
    for number in (1, 2):
        _image(root / f"test/ILSVRC2012_test_{number:08d}.JPEG", number)
    extra = tmp_path / "extra"
    for split in ("VAL", "TEST"):
        scanned = _build(root, split)
        scanned.dump_extra(str(extra))
        assert _facts(_build(root, split, extra)) == _facts(scanned)
    test = _build(root, "TEST", extra)
    assert not test.has_labels
    assert np.load(extra / "entries-TEST.npy", allow_pickle=False)["class_index"].tolist() == [2**32 - 1] * 2
    assert not (extra / "class-ids-TEST.npy").exists()


@pytest.mark.parametrize(
    "name", ["n02/photo.png", "n02/n01_3.png", "n02/n02_007.png", "n02/n02_3.jpg", "n02/sub/n02_3.png"]
)
def test_names_that_such_files_cannot_say_are_refused_and_nothing_is_written(
    root: Path, tmp_path: Path, name: str
) -> None:
    _image(root / "train" / name)
    assert len(_build(root)) == 4  # for training they are fine
    with pytest.raises(
        ValueError, match=rf"must be called <class>/<class>_<number>.*; {name} is not|n02_1\.png is not"
    ):
        _build(root).dump_extra(str(tmp_path / "extra"))
    assert not list((tmp_path / "extra").iterdir())
    with pytest.raises(ValueError, match="needs a folder"):
        _build(root).dump_extra()


@pytest.mark.parametrize("damage", ["pickled", "text", "fields", "classes", "twice", "images"])
def test_damaged_or_foreign_files_are_named(root: Path, tmp_path: Path, damage: str) -> None:
    extra = tmp_path / "extra"
    entries, ids, _ = (Path(f) for f in _build(root).dump_extra(str(extra)))
    if damage == "pickled":
        np.save(ids, np.array(["n01", None], dtype=object), allow_pickle=True)
    elif damage == "text":
        entries.write_text("hello")
    elif damage == "fields":
        np.save(entries, np.zeros(3))
    elif damage == "classes":
        np.save(ids, np.array(["n01"]))
    elif damage == "twice":
        np.save(ids, np.array(["n01", "n01"]))
    else:
        (root / "train" / TRAIN[-1]).unlink()
    message = {
        "pickled": r"class-ids-TRAIN\.npy is no array",
        "text": r"entries-TRAIN\.npy is no array",
        "fields": "must have records with actual_index and class_index, got float64",
        "classes": r"\(1 names, 1 different\).*classes up to 1.*do not belong together",
        "twice": r"\(2 names, 1 different\).*do not belong together",
        "images": r"lists 3 images such as n01/.*Remove entries-TRAIN\.npy to have the folder scanned",
    }[damage]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _build(root, extra=extra)


@pytest.mark.parametrize(("text", "message"), [("n01\n", "line 1: class 'n01' has no name"), ("n01,a\nn01,b\n", "line 2: class 'n01' is named a second time")])  # fmt: skip
def test_a_wrong_labels_file(root: Path, text: str, message: str) -> None:
    (root / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        _build(root)


def test_files_of_a_fork_beside_our_index_are_passed_over_aloud(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = tmp_path / "extra"
    dataset = _build(root, extra=extra)
    assert dataset.index_files == [str(extra / "TRAIN.index")]
    dataset.dump_extra()
    with caplog.at_level(logging.INFO, logger="dinoengine"):
        _build(root, extra=extra)
    (said,) = [r for r in caplog.records if "is not used" in r.message]
    assert said.levelno == logging.INFO
    assert "TRAIN.index (3); " in said.message
    assert "entries-TRAIN.npy beside it (3)" in said.message
    np.save(extra / "entries-TRAIN.npy", np.load(extra / "entries-TRAIN.npy")[:1])
    caplog.clear()
    assert len(_build(root, extra=extra)) == 3
    assert "entries-TRAIN.npy beside it (1) is not used. To go by the latter, remove the former" in caplog.text
    assert "WARNING" in caplog.text
    (extra / "entries-TRAIN.npy").write_bytes(b"junk")
    _build(root, extra=extra)
    assert "beside it (damaged)" in caplog.text
    (extra / "class-ids-TRAIN.npy").unlink()
    _build(root, extra=extra)
    assert "class-ids-TRAIN.npy is missing; the folder counts" in caplog.text


def test_what_the_files_of_a_fork_list_is_named_as_the_index(root: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    _build(root).dump_extra(str(extra))
    assert [os.path.basename(f) for f in _build(root, extra=extra).index_files] == ["entries-TRAIN.npy", "class-ids-TRAIN.npy", "class-names-TRAIN.npy"]  # fmt: skip
