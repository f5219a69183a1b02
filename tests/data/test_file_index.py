from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from dinoengine.data import build_dataset, file_index
from dinoengine.data.file_index import FileIndex, NoImagesError, cache_folder, index_folder
from dinoengine.data.folder_scan import ARRAY_EXTENSIONS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images, in folders that have been as they are for a long time."""
    root = tmp_path / "images"
    for name in ("cat/1.png", "cat/x/2.png", "dog/3.png", "dog/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    _age(root)
    return root


def _age(root: Path) -> None:
    for folder in (root, *(p for p in root.rglob("*") if p.is_dir())):
        os.utime(folder, (1_000_000, 1_000_000))


def _content(index: FileIndex) -> tuple[list[str], list[int] | None, list[str] | None]:
    return list(index.paths), None if index.labels is None else index.labels.tolist(), index.class_names


def _count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scans: list[str] = []
    real = file_index.scan_folder
    monkeypatch.setattr(file_index, "scan_folder", lambda folder, *which: scans.append(folder) or real(folder, *which))
    return scans


EXPECTED = (["cat/1.png", "cat/x/2.png", "dog/3.png", "dog/4.png"], [0, 0, 1, 1], ["cat", "dog"])


def test_a_second_look_reads_the_index(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = _count_scans(monkeypatch)
    first, second = index_folder(str(root), min_images=1), index_folder(str(root), min_images=1)
    assert _content(first) == _content(second) == EXPECTED
    assert scans == [str(root)]
    assert first.file == second.file is not None
    assert Path(first.file).parent == cache
    assert second.path(1) == str(root / "cat/x/2.png")
    assert _content(index_folder(str(root), cached=False)) == EXPECTED
    assert len(scans) == 2


@pytest.mark.parametrize("change", ["add", "remove", "rename", "folder", "class", "loose"])
def test_a_changed_folder_is_scanned_anew(root: Path, change: str) -> None:
    index_folder(str(root), min_images=1)
    {
        "add": lambda: (root / "cat/x/9.png").touch(),
        "remove": lambda: (root / "dog/4.png").unlink(),
        "rename": lambda: (root / "dog/4.png").rename(root / "dog/0.png"),
        "folder": lambda: (root / "cat/x").rename(root / "cat/y"),
        "class": lambda: (root / "dog").rename(root / "wolf"),
        "loose": lambda: (root / "5.png").touch(),
    }[change]()
    found = _content(index_folder(str(root), min_images=1))
    assert found == _content(index_folder(str(root), cached=False))
    assert found != EXPECTED
    _age(root)
    assert _content(index_folder(str(root), min_images=1)) == found


def test_an_index_as_young_as_the_folder_is_not_trusted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system has coarse time stamps: what came within a tick would not be seen."""
    scans = _count_scans(monkeypatch)
    os.utime(root / "dog")
    index_folder(str(root), min_images=1)
    stamp = (root / "dog").stat().st_mtime_ns
    (root / "dog" / "5.png").touch()
    os.utime(root / "dog", ns=(stamp, stamp))  # the same tick
    assert len(index_folder(str(root), min_images=1)) == 5
    assert len(scans) == 2


def test_small_folders_leave_no_index(root: Path, cache: Path) -> None:
    assert index_folder(str(root)).file is None
    assert not list(cache.glob("*.index"))


@pytest.mark.parametrize("content", [b"", b"not an index", None])
def test_a_damaged_index_is_made_anew(root: Path, content: bytes | None) -> None:
    file = index_folder(str(root), min_images=1).file
    assert file is not None
    Path(file).write_bytes(Path(file).read_bytes()[:-100] if content is None else content)
    index = index_folder(str(root), min_images=1)
    assert _content(index) == EXPECTED
    assert index.file == file


def test_an_index_of_another_version_or_folder_is_not_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = _count_scans(monkeypatch)
    place = str(tmp_path / "x.index")
    index_folder(str(root), keep_in=place, min_images=1)
    (tmp_path / "linked").symlink_to(root)
    assert index_folder(str(tmp_path / "linked"), keep_in=place, min_images=1).root == str(tmp_path / "linked")
    index_folder(str(tmp_path / "linked"), keep_in=place, min_images=1, extensions=frozenset((".png", ".new")))
    assert len(scans) == 3


def test_where_nothing_can_be_written_the_scan_is_the_index(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "x.index")
    with caplog.at_level(logging.WARNING):
        index = index_folder(str(root), keep_in=place, min_images=1)
    assert index.file is not None  # it went to the cache
    assert place in caplog.text
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "file"))
    index = index_folder(str(root), min_images=1)
    assert (_content(index), index.file) == (EXPECTED, None)


def test_a_pickled_index_is_its_file_and_a_copy_where_that_was_replaced(root: Path) -> None:
    index = index_folder(str(root), min_images=1)
    copy = pickle.loads(pickle.dumps(index))
    assert _content(copy) == EXPECTED
    assert copy.file == index.file
    (root / "dog" / "5.png").touch()
    _age(root)
    os.utime(root / "dog", (2_000_000, 2_000_000))
    assert len(index_folder(str(root), min_images=1)) == 5
    copy = pickle.loads(pickle.dumps(index))
    assert (_content(copy), copy.file) == (EXPECTED, None)


def test_a_file_replaced_between_pickling_and_reading_is_an_error(root: Path) -> None:
    index = index_folder(str(root), min_images=1)
    data = pickle.dumps(index)
    assert index.file is not None
    os.utime(index.file, (5, 5))
    with pytest.raises(RuntimeError, match="was made anew while a process was started"):
        pickle.loads(data)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").touch()
    with pytest.raises(NoImagesError, match=r"holds no image; found 1 x \.txt\. Accepted extensions: \.bmp"):
        index_folder(str(tmp_path / "images"))


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DINOENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == str(tmp_path / "dinoengine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == str(tmp_path / ".cache" / "dinoengine")


def _in_process(
    root: str, ready: multiprocessing.synchronize.Barrier, out: multiprocessing.Queue[tuple[int, str]]
) -> None:
    ready.wait()
    index = index_folder(root, min_images=1)
    out.put((len(index), str(index.file)))


def test_processes_that_start_together_get_one_index(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, out = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_in_process, args=(str(root), ready, out)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {out.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {(4, index_folder(str(root), min_images=1).file)}


def test_a_dataset_string_may_ask_for_a_scan(root: Path, cache: Path) -> None:
    assert len(build_dataset(f"folder:{root}:cached=false")) == 4
    assert not cache.exists()


def test_pictures_and_arrays_of_a_folder_have_an_index_each(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = _count_scans(monkeypatch)
    (root / "array.npy").touch()
    _age(root)
    for _ in range(2):
        pictures = index_folder(str(root), min_images=1)
        arrays = index_folder(str(root), min_images=1, extensions=ARRAY_EXTENSIONS)
        assert [arrays.path(0)] == [str(root / "array.npy")]
        assert len(pictures) > 1
    assert len(scans) == 2
