from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dinoengine.utils.file_writing import atomic_write, remove_stale_temporaries, write_json


def test_the_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_write(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_old_content_is_readable_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(str(path), "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no")])
@pytest.mark.parametrize("existing", [None, "old"])
def test_an_error_in_the_block_leaves_everything_as_it_was(
    tmp_path: Path, error: BaseException, existing: str | None
) -> None:
    path = tmp_path / "a.txt"
    if existing is not None:
        path.write_text(existing)
    before = os.listdir(tmp_path)

    def write_half() -> None:
        with atomic_write(str(path), "w") as file:
            file.write("half")
            raise error

    with pytest.raises(type(error), match="no"):
        write_half()
    assert os.listdir(tmp_path) == before
    if existing is not None:
        assert path.read_text() == existing


def test_a_failing_rename_removes_the_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"), atomic_write(str(target)) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_relative_path_and_a_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_write("a.txt", "w") as file:
        file.write("x")
    assert (tmp_path / "a.txt").read_text() == "x"
    with pytest.raises(FileNotFoundError, match="gone"), atomic_write("gone/a.txt"):
        pass


def test_the_temporary_file_lies_in_the_same_folder(tmp_path: Path) -> None:
    # A rename is atomic only within one file system.
    with atomic_write(str(tmp_path / "a.txt")):
        (name,) = os.listdir(tmp_path)
        assert name.startswith(".a.txt.")


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.txt"
    before = os.umask(umask)
    try:
        with atomic_write(str(path), "w") as file:
            file.write("x")
    finally:
        restored = os.umask(before)
    assert restored == umask  # reading the mask must not change it
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


KILLED_WRITER = """
import os, signal, sys
from dinoengine.utils.file_writing import atomic_write, write_json
with atomic_write(sys.argv[1], "w") as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_text("old")
    finished = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(path)], cwd=Path(__file__).parents[2], check=False
    )
    assert finished.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(str(path), "w") as file:  # and the remains do not disturb the next attempt
        file.write("new")
        (tmp_path / ".foreign.tmp").touch()
        # What the killed process left goes; what is being written at the moment stays.
        (removed,) = remove_stale_temporaries(str(tmp_path))
    assert removed.startswith(".checkpoint.")
    assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".foreign.tmp", "checkpoint"]


def test_data_and_folder_are_flushed_to_disk_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def spy_replace(source: str, target: str) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    with atomic_write(str(tmp_path / "a")) as file:
        file.write(b"x")
    assert calls == ["sync file", "rename", "sync folder"]


def test_json_files_are_valid_whatever_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(str(path), {"a": [1.5, math.nan, {"b": -math.inf}], "c": (math.inf, 2, "NaN"), "d": True, "e": None})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None, {"b": None}], "c": [None, 2, "NaN"], "d": True, "e": None}
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize(("code", "is_lost"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_flush_folders_holds_files_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_lost: bool
) -> None:
    fsync = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with pytest.raises(OSError, match="error") if is_lost else contextlib.nullcontext():
        write_json(str(tmp_path / "a.json"), {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
