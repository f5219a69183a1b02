from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import UnreadableImageError, build_dataset
from dinoengine.data.datasets import tar_shards


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((3, 2), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def _shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_by_index_with_labels_in_any_order(tmp_path: Path) -> None:
    _shard(
        tmp_path / "s-0.tar",
        ("a.cls", b"2\n"),
        ("a.png", _png(5)),
        ("a.json", b"{}"),
        ("b.png", _png(6)),
        ("b.cls", b"0"),
    )
    _shard(tmp_path / "s-1.tar", ("x/c.png", _png(7)), ("x/c.cls", b"1"))
    dataset = build_dataset(f"wds:{tmp_path}/s-{{0..1}}.tar")
    assert (len(dataset), dataset.class_names) == (3, ["0", "1", "2"])
    copy = pickle.loads(pickle.dumps(dataset))
    for one in (dataset, copy, build_dataset(f"wds:{tmp_path}/s-*.tar")):
        assert [int(np.asarray(one.load(i))[0, 0]) for i in (2, 0, 1)] == [7, 5, 6]
        assert [one.label(i) for i in range(3)] == one.labels().tolist() == [2, 0, 1]
    assert dataset.describe(2) == f"{tmp_path}/s-1.tar/x/c.png"


def test_a_sample_without_label_makes_it_unlabelled(tmp_path: Path) -> None:
    _shard(tmp_path / "s.tar", ("a.png", _png(5)), ("a.cls", b"1"), ("b.png", _png(6)))
    dataset = build_dataset(f"wds:{tmp_path}/s.tar")
    assert (dataset.class_names, dataset.label(0)) == (None, None)


def test_the_index_is_kept_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = tar_shards.tar_members
    monkeypatch.setattr(tar_shards, "tar_members", lambda path: read.append(path) or real(path))
    _shard(tmp_path / "s.tar", ("a.png", _png(5)))
    for _ in range(2):
        assert len(build_dataset(f"wds:{tmp_path}/s.tar")) == 1
    assert len(read) == 1
    _shard(tmp_path / "s.tar", ("a.png", _png(5)), ("b.png", _png(6)), *((f"{i}.txt", b"x") for i in range(30)))
    assert len(build_dataset(f"wds:{tmp_path}/s.tar")) == 2


def test_a_bad_member_is_a_bad_image(tmp_path: Path) -> None:
    _shard(tmp_path / "s.tar", ("a.png", b"no image"), ("b.png", b""))
    dataset = build_dataset(f"wds:{tmp_path}/s.tar")
    for index, name in enumerate(("a", "b")):
        with pytest.raises(UnreadableImageError, match=rf"s\.tar/{name}\.png is not a readable image"):
            dataset.load(index)


def test_wrong_shards(tmp_path: Path) -> None:
    _shard(tmp_path / "0.tar", ("a.txt", b"x"))
    with pytest.raises(ValueError, match=r"hold no image"):
        build_dataset(f"wds:{tmp_path}/0.tar")
    with pytest.raises(FileNotFoundError, match=r"7 of 8 shards are missing\. The first of them:\n(.*\d\.tar\n?){5}$"):
        build_dataset(f"wds:{tmp_path}/{{0..7}}.tar")
    _shard(tmp_path / "1.tar", ("a.png", _png(1)), ("a.cls", b"cat"))
    with pytest.raises(
        ValueError, match=r"1\.tar/a\.cls must hold a whole number up to 9,999,999, the label; got 'cat'"
    ):
        build_dataset(f"wds:{tmp_path}/1.tar")


def test_a_tar_per_class(tmp_path: Path) -> None:
    _shard(tmp_path / "n02.tar", ("n02_1.JPEG", _png(7)))
    _shard(tmp_path / "n01.tar", ("n01_1.JPEG", _png(5)), ("n01_2.JPEG", _png(6)))
    dataset = build_dataset(f"ImageNet22k:root={tmp_path}:extra=/nowhere")
    assert dataset.class_names == ["n01", "n02"]
    assert dataset.labels().tolist() == [0, 0, 1]
    assert [(dataset.label(i), int(np.asarray(dataset.load(i))[0, 0])) for i in range(3)] == [(0, 5), (0, 6), (1, 7)]
    with pytest.raises(FileNotFoundError, match=r"<class>\.tar per class, and .*/cache has none"):
        build_dataset(f"ImageNet22k:root={tmp_path}/cache")


@pytest.mark.parametrize("text", ["99999999999", "10000000", "1" * 5000])
def test_a_label_without_end_is_no_label(tmp_path: Path, text: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("1.cls")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text.encode()))
    with pytest.raises(ValueError, match=r"s\.tar/1\.cls must hold a whole number up to 9,999,999"):
        build_dataset(f"wds:{tmp_path}/s.tar")
