from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import build_dataset, file_index
from dinoengine.data.file_index import index_folder
from dinoengine.data.index_cache import describe_indexes, kept_indexes, prune


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes of the folders one and two and of two shards."""
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_index, "MIN_IMAGES", 1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
        index_folder(str(tmp_path / name), min_images=1)
    out = io.BytesIO()
    Image.fromarray(np.zeros((3, 2), dtype=np.uint8)).save(out, "PNG")
    for shard in (0, 1):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            info = tarfile.TarInfo("1.png")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    build_dataset(f"wds:{tmp_path}/{{0,1}}.tar")
    return tmp_path / "cache" / "index"


def test_what_is_kept(tmp_path: Path, cache: Path) -> None:
    found = kept_indexes()
    assert sorted(index.source for index in found) == [f"{tmp_path}/0.tar", f"{tmp_path}/one", f"{tmp_path}/two"]
    assert all(index.is_usable and index.num_bytes == Path(index.path).stat().st_size for index in found)
    told = describe_indexes(found, str(cache)).splitlines()
    assert len(told) == 4
    assert told[-1] == f"3 index(es), {sum(i.num_bytes for i in found):,} bytes, in {cache}"
    assert not any("unusable" in line for line in told)
    assert prune() == []
    assert kept_indexes() == found


@pytest.mark.parametrize("gone", ["one", "1.tar"])
def test_what_is_of_something_gone_is_removed(tmp_path: Path, cache: Path, gone: str) -> None:
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (removed,) = prune()
    assert removed.source == str(tmp_path / ("one" if gone == "one" else "0.tar"))
    assert "unusable: " in describe_indexes([removed], str(cache))
    assert removed.path not in [index.path for index in kept_indexes()]
    assert len(kept_indexes()) == 2


def test_what_is_no_index_and_what_dead_processes_left_is_removed_and_nothing_else(cache: Path) -> None:
    before = sorted(p.name for p in cache.iterdir())
    for name in ("x.index", "y.tars", "z.index.lock", ".z.index.0123abcd.tmp", "notes.txt"):
        (cache / name).write_bytes(b"junk")
    assert sorted(Path(index.path).name for index in prune()) == ["x.index", "y.tars"]
    assert sorted(p.name for p in cache.iterdir()) == sorted([*before, "notes.txt"])


def test_without_a_cache_there_is_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "none"))
    assert kept_indexes() == prune() == []
    assert not (tmp_path / "none").exists()
