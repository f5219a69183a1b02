"""Runs that are asked to end, or lose a process, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dinoengine.engine.verify import compare_checkpoints
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


@contextmanager
def _started(out: Path, *words: object) -> Iterator[subprocess.Popen[str]]:
    """``tools/train_net.py`` as the leader of a process group, as a shell starts it; nothing of it is left behind."""
    overrides = [str(w) for key, value in TINY.items() for w in (key, value)]
    command = [sys.executable, "tools/train_net.py", *overrides, "OUTPUT_DIR", out, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for_iteration(process: subprocess.Popen[str], number: int) -> str:
    """What was printed until an iteration of at least this number was logged."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if " iter " in line and int(line.split(" iter ")[1].split("/")[0]) >= number:
            return "".join(lines)
    raise AssertionError("the run ended before:\n" + "".join(lines))


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    words = ("SOLVER.MAX_ITER", 60, "TEST.EVAL_PERIOD", 10, "DATALOADER.NUM_WORKERS", 1, "LOG.PERIOD", 5)
    with _started(tmp_path / "whole", *words) as whole:
        whole.communicate(timeout=240)
        assert whole.returncode == 0
    with _started(tmp_path / "run", *words) as first:
        _wait_for_iteration(first, 15)
        os.killpg(first.pid, signal.SIGTERM)  # as a scheduler does: the loader's worker gets it as well
        printed, _ = first.communicate(timeout=180)
    assert first.returncode == 75, printed
    assert "received SIGTERM: saving after this iteration" in printed
    assert "--resume goes on with it" in printed
    assert "Traceback" not in printed
    with _started(tmp_path / "run", "--resume", *words) as second:
        printed, _ = second.communicate(timeout=240)
    assert second.returncode == 0, printed
    runs = [str(tmp_path / name / "model_final.pth") for name in ("run", "whole")]
    assert compare_checkpoints(*runs).different == []


def test_ctrl_c_of_a_terminal_pauses_two_processes_in_the_same_iteration(tmp_path: Path) -> None:
    words = ("--num-gpus", 2, "SOLVER.MAX_ITER", 100000, "LOG.PERIOD", 5)
    with _started(tmp_path, *words) as process:
        _wait_for_iteration(process, 10)
        os.killpg(process.pid, signal.SIGINT)  # the whole foreground group
        printed, _ = process.communicate(timeout=180)
    assert process.returncode == 75, printed
    assert printed.count("received SIGINT: saving") == 2  # both, once each
    assert printed.count("Pausing after iteration") == 1  # rank 0 logs to the console
    assert "Traceback" not in printed
    assert len(list(tmp_path.glob("model_*.pth"))) == 1


def test_one_rank_that_is_signalled_pauses_both_and_one_that_dies_ends_both(tmp_path: Path) -> None:
    words = ("--num-gpus", 2, "SOLVER.MAX_ITER", 100000, "LOG.PERIOD", 5)
    with _started(tmp_path, *words) as process:
        _wait_for_iteration(process, 10)
        os.kill(_ranks(process)[1], signal.SIGUSR1)
        printed, _ = process.communicate(timeout=180)
    assert process.returncode == 75, printed
    assert "a signal to another process" in printed

    with _started(tmp_path, "--resume", *words) as process:
        _wait_for_iteration(process, 20)
        os.kill(_ranks(process)[1], signal.SIGKILL)
        printed, _ = process.communicate(timeout=180)
    assert process.returncode not in (0, 75)
    assert "Process 1 of this run was ended by SIGKILL" in printed


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    words = ("SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 5, "LOG.PERIOD", 5)
    with _started(tmp_path, *words) as process:
        _wait_for_iteration(process, 10)
        os.kill(process.pid, signal.SIGSTOP)  # both arrive before the next iteration
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        process.communicate(timeout=180)
    assert process.returncode in (-signal.SIGINT, -signal.SIGTERM)
    assert (tmp_path / "last_checkpoint").read_text() in os.listdir(tmp_path)


def test_a_time_budget_ends_a_run_that_would_take_longer(tmp_path: Path) -> None:
    with _started(tmp_path, "--time-budget", "15s", "SOLVER.MAX_ITER", 10**7) as process:
        printed, _ = process.communicate(timeout=240)
    assert process.returncode == 75, printed
    assert "--time-budget is used up" in printed
    assert (tmp_path / "last_checkpoint").exists()


def _ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in the order they were started; the launcher also has a resource tracker."""
    ranks = []
    for pid in sorted(_children(launcher.pid)):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"spawn_main" in command:
            ranks.append(pid)
    return ranks
