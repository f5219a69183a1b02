from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dinoengine.data import folder_scan
from dinoengine.data.folder_scan import is_image, scan_folder, unchanged


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_the_slow_way_finds_the_same(tmp_path: Path) -> None:
    for i in range(60):
        _touch(tmp_path / f"d{i % 7}" / f"e{i % 3}" / f"{i}{'.txt' if i % 5 == 0 else '.jpg'}")
    scan = scan_folder(str(tmp_path))
    walked = [Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names]
    assert scan.paths == sorted(str(p.relative_to(tmp_path)) for p in walked if p.suffix == ".jpg")
    assert scan.others == {".txt": 12}
    assert len(scan.folders) == 1 + 7 + 21
    assert scan.folders[0] == (".", tmp_path.stat().st_mtime_ns)


@pytest.mark.parametrize("root", ["{}", "{}/"])
def test_paths_are_relative(tmp_path: Path, root: str) -> None:
    _touch(tmp_path / "a" / "1.jpg")
    assert scan_folder(root.format(tmp_path)).paths == ["a/1.jpg"]


def test_stamps_tell_what_was_added_removed_renamed_or_vanished(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/b/2.jpg", "c/3.jpg"):
        _touch(tmp_path / name)
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "c"):
        os.utime(folder, (1, 1))
    scan = scan_folder(str(tmp_path))

    def same() -> bool:
        return unchanged(str(tmp_path), [name for name, _ in scan.folders], [stamp for _, stamp in scan.folders])

    assert same()
    (tmp_path / "a" / "1.jpg").write_bytes(b"another content")
    assert same()
    for change, back in (
        (lambda: _touch(tmp_path / "a/b/new.jpg"), tmp_path / "a/b"),
        (lambda: (tmp_path / "a/b/new.jpg").rename(tmp_path / "a/b/other.jpg"), tmp_path / "a/b"),
        (lambda: (tmp_path / "a/b/other.jpg").unlink(), tmp_path / "a/b"),
    ):
        change()
        assert not same()
        os.utime(back, (1, 1))
        assert same()
    (tmp_path / "c").rename(tmp_path / "moved")
    os.utime(tmp_path, (1, 1))
    assert not same()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path / "locked" / "1.jpg")
    real = os.scandir

    def scandir(folder: str) -> Any:
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(folder_scan.os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"cannot be listed \(Permission denied\); make it readable.*/locked"):
        scan_folder(str(tmp_path))


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    _touch(tmp_path / "a" / "1.jpg")
    _touch(tmp_path / "b" / "2.jpg")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    assert scan_folder(str(tmp_path)).paths == ["a/1.jpg", "b/2.jpg"]


def test_links_to_themselves_and_to_nothing_are_no_folders(tmp_path: Path) -> None:
    _touch(tmp_path / "a" / "1.jpg")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    scan = scan_folder(str(tmp_path))
    assert scan.paths == ["a/1.jpg", "itself.jpg"]  # counted as a bad image when its turn comes
    assert scan.others == {"": 2}


def test_extensions_of_any_case() -> None:
    assert is_image("a.b.JPeG")
    assert not is_image("jpg")
