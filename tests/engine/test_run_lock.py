"""One process in an OUTPUT_DIR, with real processes that are killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dinoengine.engine.run_lock import LOCK_FILE, RunInUseError, RunLock

ROOT = Path(__file__).resolve().parent.parent.parent

# Loads the module alone: the package takes seconds to import.
_HOLD = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("run_lock", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lock = module.RunLock(sys.argv[1], heartbeat_seconds=0.1)
try:
    print("took over" if lock.acquire() else "acquired", flush=True)
except module.RunInUseError as error:
    print("refused", error, flush=True)
    sys.exit(2)
if "fork" in sys.argv:
    worker = os.fork()
    if worker == 0:
        time.sleep(600)
    print(worker, flush=True)
sys.stdin.readline()
lock.release()
"""


@contextmanager
def _holding(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that tries for the lock, and holds it until it reads a line."""
    module = ROOT / "dinoengine" / "engine" / "run_lock.py"
    command = [sys.executable, "-c", _HOLD, str(folder), str(module), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _quick(folder: Path) -> RunLock:
    return RunLock(str(folder), heartbeat_seconds=0.05, watch_seconds=0.5)


def _write(folder: Path, **holder: Any) -> None:
    (folder / LOCK_FILE).write_text(json.dumps({"host": "h", "pid": 7, "started": "noon", **holder}))


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_second_is_told_who_has_it_until_it_is_free(tmp_path: Path) -> None:
    with _holding(tmp_path) as first:
        assert _said(first) == "acquired"
        named = rf"process {first.pid} on {socket.gethostname()}, started \d{{4}}-\d\d-\d\dT"
        with pytest.raises(RunInUseError, match=named):
            _quick(tmp_path).acquire()
        with _holding(tmp_path) as second:
            assert _said(second).startswith("refused OUTPUT_DIR")
            assert second.wait(60) == 2
        first.communicate("\n", timeout=60)
    assert not (tmp_path / LOCK_FILE).exists()
    lock = _quick(tmp_path)
    assert lock.acquire() == ""
    lock.release()
    assert os.listdir(tmp_path) == []


def _acquired_soon(lock: RunLock) -> str:
    """The worker may not have come to the line that closes its copy of the lock."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return lock.acquire()
        except RunInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_killed_holder_frees_it_although_its_worker_lives(tmp_path: Path) -> None:
    with _holding(tmp_path, "fork") as first:
        assert _said(first) == "acquired"
        worker = int(_said(first))
        try:
            first.kill()
            first.wait()
            os.kill(worker, 0)  # alive
            lock = _quick(tmp_path)
            assert f"of a process that is gone: process {first.pid} on " in _acquired_soon(lock)
            lock.release()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    """Also while the file is removed and made again, which gives the path to another file."""
    inside, most, failures = [0], [0], []
    guard = threading.Lock()

    def compete() -> None:
        for _ in range(40):
            lock = _quick(tmp_path)
            try:
                lock.acquire()
            except RunInUseError:
                continue
            except Exception as error:
                failures.append(error)
                return
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            with guard:
                inside[0] -= 1
            lock.release()

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert most == [1]


def test_a_holder_on_another_machine_that_shows_life_is_respected(tmp_path: Path) -> None:
    """An flock that could be had says nothing of a machine that does not share it."""
    _write(tmp_path, machine="other")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunInUseError, match="process 7 on h, started noon"):
            RunLock(str(tmp_path), heartbeat_seconds=0.05, watch_seconds=30).acquire()
    finally:
        stop.set()
        thread.join()


def test_a_holder_on_another_machine_without_life_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its clock said: a time in the future is no sign of life."""
    _write(tmp_path, machine="other")
    os.utime(tmp_path / LOCK_FILE, (4e9, 4e9))
    lock = _quick(tmp_path)
    assert "process 7 on h" in lock.acquire()
    assert "watching for up to" in caplog.text
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_without_flocks_a_living_holder_is_seen_and_a_dead_one_followed(tmp_path: Path, no_flock: None) -> None:
    first = _quick(tmp_path)
    assert first.acquire() == ""
    with pytest.raises(RunInUseError, match=f"process {os.getpid()}"):
        _quick(tmp_path).acquire()
    first.release()
    assert not (tmp_path / LOCK_FILE).exists()
    _write(tmp_path, machine=first._me["machine"])
    second = _quick(tmp_path)
    assert "process 7 on h" in second.acquire()
    second.release()


def test_another_error_of_flock_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        _quick(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_half_written_file_is_no_holder(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    lock = _quick(tmp_path)
    assert lock.acquire() == ""
    lock.release()


def test_a_started_program_does_not_have_it(tmp_path: Path) -> None:
    lock = _quick(tmp_path)
    lock.acquire()
    with subprocess.Popen(["sleep", "600"], close_fds=False) as program:
        try:
            open_files = [os.readlink(path) for path in Path(f"/proc/{program.pid}/fd").iterdir()]
            assert not any(name.endswith(LOCK_FILE) for name in open_files)
        finally:
            program.kill()
    lock.release()


def test_a_file_that_its_holder_removed_in_this_moment_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened, and is locked; but another process would lock the new file of that name."""
    flock, calls = fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    lock = _quick(tmp_path)
    lock.acquire()
    assert len(calls) == 2
    with _holding(tmp_path) as second:
        assert _said(second).startswith("refused OUTPUT_DIR")
    lock.release()


def test_releasing_what_was_not_acquired_does_nothing(tmp_path: Path) -> None:
    with _holding(tmp_path) as first:
        assert _said(first) == "acquired"
        lock = _quick(tmp_path)
        with pytest.raises(RunInUseError):
            lock.acquire()
        lock.release()
        assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_that_was_removed_with_its_folder_is_taken_anew_or_the_run_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = _quick(folder)
    lock.keep()  # not acquired: nothing to keep
    lock.acquire()
    assert not lock.keep()
    assert caplog.text == ""
    shutil.rmtree(folder)
    assert lock.keep()
    assert "was removed or replaced; this run has locked it anew" in caplog.text
    with _holding(folder) as second:
        assert _said(second).startswith("refused OUTPUT_DIR")
    shutil.rmtree(folder)
    folder.mkdir()
    with _holding(folder) as second:
        assert _said(second) == "acquired"
        for _ in range(2):  # what swallows the first error must meet the second
            with pytest.raises(RunInUseError, match=rf"was removed, and taken by another.*process {second.pid} on"):
                lock.keep()
        lock.release()  # has none, and leaves that of the other
        assert (folder / LOCK_FILE).exists()


def test_an_output_dir_that_became_a_file_cannot_be_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = _quick(folder)
    lock.acquire()
    shutil.rmtree(folder)
    folder.touch()
    for _ in range(2):
        with pytest.raises(FileExistsError):
            lock.keep()
    folder.unlink()
    assert lock.keep()  # there can be one again
    lock.release()
    assert not list(folder.iterdir())
