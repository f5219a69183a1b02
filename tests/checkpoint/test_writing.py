"""What is on disk after a save, whatever happens during it."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointWriteError, read_checkpoint
from dinoengine.checkpoint.writing import num_bytes, snapshot

ROOT = Path(__file__).parents[2]


def _model(value: float) -> nn.Module:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def _weight_in(path: Path) -> float:
    return read_checkpoint(str(path))["model"]["weight"][0, 0].item()


def test_a_snapshot_shares_nothing_that_changes() -> None:
    history = [1.0]
    state = {"a": torch.ones(2), "b": [{"c": torch.zeros(2, 2).t()}, (torch.ones(1), 3)], "h": history}
    kept = snapshot(state)
    state["a"].add_(1)
    state["b"][0]["c"].add_(1)
    state["b"][1][0].add_(1)
    history.append(2.0)
    assert kept["a"].tolist() == [1, 1]
    assert kept["b"][0]["c"].tolist() == [[0, 0], [0, 0]]
    assert kept["b"][1][0].tolist() == [1]
    assert kept["h"] == [1.0]
    assert num_bytes(state) == 8 + 16 + 4


class _Gate:
    """Stops the writing thread in the middle of a file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.threads: list[str] = []
        save = torch.save

        def slow(data: Any, file: Any) -> None:
            self.threads.append(threading.current_thread().name)
            self.reached.set()
            assert self.opened.wait(60)
            save(data, file)

        monkeypatch.setattr(torch, "save", slow)


def test_in_the_background_the_state_of_that_moment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, model = _Gate(monkeypatch), _model(1.0)
    checkpointer = Checkpointer(model, str(tmp_path))
    done: list[str] = []
    path = checkpointer.save("model_0000000", iteration=0, background=True, then=lambda: done.append("then"))
    assert gate.reached.wait(60)
    _fill(model, 2.0)  # training goes on
    assert not os.path.exists(path)
    assert not os.path.exists(tmp_path / "last_checkpoint")  # moves only after the file
    assert done == []
    gate.opened.set()
    checkpointer.wait()
    assert _weight_in(Path(path)) == 1.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    assert done == ["then"]
    assert gate.threads == ["checkpoint-writer"]


def test_the_next_save_and_a_load_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, model = _Gate(monkeypatch), _model(1.0)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000000", iteration=0, background=True)
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.opened.set).start()
    assert checkpointer.resume_or_load("", resume=True) == 1
    _fill(model, 2.0)
    checkpointer.save("model_0000001", iteration=1, background=True)
    _fill(model, 3.0)
    checkpointer.save("model_best", tag_last=False, iteration=1)
    assert [_weight_in(tmp_path / f"model_{name}.pth") for name in ("0000000", "0000001", "best")] == [1, 2, 3]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_what_goes_wrong_in_the_background_comes_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(_model(1.0), str(tmp_path))
    checkpointer.save("model_0000000", iteration=0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        for surfaces in (checkpointer.wait, lambda: checkpointer.save("model_0000002", iteration=2)):
            checkpointer.save("model_0000001", iteration=1, background=True)
            with pytest.raises(CheckpointWriteError, match=r"model_0000001\.pth could not be written: No space left"):
                surfaces()
            checkpointer.wait()
        checkpointer.save("model_0000001", iteration=1, background=True)
        checkpointer.settle()  # logs
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000000.pth"]


def test_what_is_no_matter_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    checkpointer = Checkpointer(_model(1.0), str(tmp_path), metadata={"notes": {1, 2}})
    with pytest.raises(TypeError, match="notes is a builtins.set"):
        checkpointer.save("w")
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, sys
import torch
from dinoengine.checkpoint import Checkpointer, CheckpointWriteError
folder = sys.argv[1]
checkpointer = Checkpointer(torch.nn.Linear(100, 100), folder)
checkpointer.save("model_0000000", iteration=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
checkpointer.model = torch.nn.Linear(1000, 1000)
for background in (False, True):
    try:
        checkpointer.save("model_0000001", iteration=1, background=background)
        checkpointer.wait()
    except CheckpointWriteError as error:
        print(error)
checkpointer.model = torch.nn.Linear(100, 100)
checkpointer.save("model_0000002", iteration=2)
"""


@pytest.mark.slow
def test_a_file_that_finds_no_room(tmp_path: Path) -> None:
    """The kernel refuses in the middle of the file."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("model_0000001.pth could not be written: File too large. It needs 3.8 MiB") == 2
    assert f"{tmp_path} has" in result.stdout
    assert result.stdout.count("the last good checkpoint is model_0000000.pth") == 2
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000000.pth", "model_0000002.pth"]


ENDS_AT_ONCE = """
import sys
import torch
from dinoengine.checkpoint import Checkpointer
checkpointer = Checkpointer(torch.nn.Linear(2000, 1000), sys.argv[1])
checkpointer.save("model_0000000", iteration=0, background=True)
sys.exit(3)
"""


@pytest.mark.slow
def test_a_process_that_ends_finishes_its_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS_AT_ONCE, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 3
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    assert read_checkpoint(str(tmp_path / "model_0000000.pth"))["iteration"] == 0


SAVES_FOREVER = """
import os, signal, sys, time
import torch
from dinoengine.checkpoint import Checkpointer
folder, num_kills = sys.argv[1], int(sys.argv[2])
for kill in range(num_kills):
    child = os.fork()  # a process that has torch already
    if child == 0:
        torch.set_num_threads(1)
        model = torch.nn.Linear(300, 300, bias=False)
        checkpointer = Checkpointer(model, folder)
        start = checkpointer.resume_or_load("", resume=True)
        for iteration in range(start, 10**6):
            torch.nn.init.constant_(model.weight, iteration)
            checkpointer.save(f"model_{iteration % 4:07d}", iteration=iteration, background=kill % 2 == 1)
    time.sleep(float(sys.argv[3 + kill]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model = torch.nn.Linear(300, 300, bias=False)
    checkpointer = Checkpointer(model, folder)
    path = checkpointer.get_checkpoint_file()  # the last one, not an earlier one
    if path:
        iteration = checkpointer.load(path)["iteration"]
        print(iteration, model.weight.min().item(), model.weight.max().item(), flush=True)
    else:
        print(-1, -1, -1, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_byte_the_last_checkpoint_is_good(tmp_path: Path) -> None:
    """SIGKILL at random moments of a loop that does nothing but save; half of them in the background."""
    delays = [f"{random.Random(i).uniform(0.02, 0.4):.3f}" for i in range(20)]
    command = [sys.executable, "-c", SAVES_FOREVER, str(tmp_path), str(len(delays)), *delays]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seen = [
        tuple(float(word) for word in line.split()) for line in result.stdout.splitlines() if line[:1] in "-0123456789"
    ]
    assert len(seen) == len(delays)
    assert all(iteration == smallest == largest for iteration, smallest, largest in seen), seen
    iterations = [iteration for iteration, *_ in seen]
    assert iterations == sorted(iterations)
    assert iterations[-1] > 0
    Checkpointer(nn.Linear(300, 300, bias=False), str(tmp_path)).resume_or_load("", resume=True)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_what_follows_a_file_on_disk_is_no_error_of_writing_it(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(_model(1.0), str(tmp_path))
    with pytest.raises(
        CheckpointWriteError, match=r"model_0000000\.pth is on disk, but what follows it failed.*No space"
    ):
        checkpointer.save("model_0000000", iteration=0, then=fail)
    assert checkpointer.last_checkpoint_name() == "model_0000000.pth"
    assert Checkpointer(_model(2.0), str(tmp_path)).resume_or_load("") == 1


def test_an_output_dir_that_became_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointWriteError, match=r"run is a file now, and must be a folder"):
        Checkpointer(_model(1.0), str(tmp_path / "run")).save("model_0000000", iteration=0)


def test_a_save_asks_first_and_writes_nothing_if_it_must_not(tmp_path: Path) -> None:
    checkpointer = Checkpointer(_model(1.0), str(tmp_path))

    def refuse() -> None:
        raise ValueError("taken by another")

    checkpointer.before_save = refuse
    for background in (False, True):
        with pytest.raises(ValueError, match="taken by another"):
            checkpointer.save("model_0000000", iteration=0, background=background)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, r"and a little more; .* MiB free\. Nothing .* Make room, or keep fewer"),
        (errno.EDQUOT, r"MiB free, so a quota or a limit is in the way\. Nothing"),
        (errno.EPERM, r"MiB free\. Nothing .* Give yourself the right to write there, then continue"),
    ],
)
def test_the_cause_decides_what_is_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointWriteError, match=said):
        Checkpointer(_model(1.0), str(tmp_path)).save("model_0000000", iteration=0)
