"""Two trainings on one OUTPUT_DIR, and a training that is killed, in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.end_to_end.test_stopping import _ranks, _started, _wait_for_iteration

pytestmark = pytest.mark.slow


def test_a_second_training_is_refused_by_all_its_processes_and_a_killed_one_is_followed(tmp_path: Path) -> None:
    words = ("--resume", "--num-gpus", 2, "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 5, "LOG.PERIOD", 5)
    with _started(tmp_path, *words) as first:
        _wait_for_iteration(first, 10)
        holder = _ranks(first)[0]
        with _started(tmp_path, *words) as second:
            printed, _ = second.communicate(timeout=180)
        assert second.returncode == 2, printed
        assert f"error: OUTPUT_DIR {tmp_path} is in use by process {holder} on " in printed
        assert "Traceback" not in printed
        os.kill(holder, signal.SIGKILL)
        first.communicate(timeout=180)
    with _started(tmp_path, "--resume", "SOLVER.MAX_ITER", 20, "DATASETS.TEST", "()") as third:
        printed, _ = third.communicate(timeout=180)
    assert third.returncode == 0, printed
    assert f"of a process that is gone: process {holder} on " in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / ".lock").exists()
