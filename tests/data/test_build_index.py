from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dinoengine.data.build_index import build_index
from dinoengine.data.index_cache import kept_indexes


def test_the_index_is_made_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    for name in ("a/a_1.png", "b/b_2.png"):
        (tmp_path / "root" / "train" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / "train" / name).touch()
    extra = tmp_path / "extra"
    text = f"ImageNet:split=TRAIN:root={tmp_path}/root:extra={extra}"
    told = build_index(text, dump_extra=True)
    assert "2 images, 2 classes" in told
    assert f"index: {extra}/TRAIN.index\n  wrote {extra}/entries-TRAIN.npy" in told
    assert sorted(p.name for p in extra.iterdir()) == ["TRAIN.index", *(f"{k}-TRAIN.npy" for k in ("class-ids", "class-names", "entries"))]  # fmt: skip
    small = build_index(f"folder:{tmp_path}/root")
    assert "2 images, 1 classes" in small
    assert small.endswith("index: none is kept")
    assert "index: none is kept" in build_index("synthetic:num_images=3:size=8")
    with pytest.raises(ValueError, match="index files of ImageNet"):
        build_index(f"folder:{tmp_path}/root", dump_extra=True)


def test_the_index_of_shards_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        Image.new("L", (8, 8)).save(tmp_path / "1.png")
        tar.add(tmp_path / "1.png", "1.png")
    for _ in range(2):  # made, then read
        named = build_index(f"wds:{tmp_path}/s.tar").rpartition("index: ")[2]
        assert [named] == [index.path for index in kept_indexes()]
