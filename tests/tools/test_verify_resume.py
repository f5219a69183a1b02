"""tools/verify_resume.py on the debug config, as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


def _verify(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/verify_resume.py", "--config-file", "configs/debug.yaml", "--iterations", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *(str(w) for w in words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_one_process_is_exact() -> None:
    done = _verify("--num-gpus", 0, "--resume-workers", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples   the same: 64 in 8 iterations" in done.stdout
    assert "verdict   EXACT" in done.stdout


def test_two_processes_resumed_by_one_see_the_same_samples() -> None:
    done = _verify("--num-gpus", 2, "--resume-num-gpus", 1, "MODEL.DEVICE", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples   the same: 64 in 8 iterations" in done.stdout
    assert "verdict   THE SAME SAMPLES" in done.stdout


def test_a_run_that_fails_shows_its_output() -> None:
    done = _verify("--num-gpus", 0, "DATASETS.TRAIN", "folder:/no/such")
    assert done.returncode == 1
    assert "/no/such does not exist" in done.stdout
    assert "a training failed with exit code 2" in done.stderr


_FSDP = ("MODEL.PARALLEL", "fsdp", "SOLVER.NUM_MICRO_BATCHES", 2, "MODEL.LOSS.KOLEO_GROUP_SIZE", 2)


@pytest.mark.parametrize("words", [(), _FSDP], ids=["ddp", "fsdp"])
def test_two_processes_are_exact(words: tuple[object, ...]) -> None:
    """The second with sharded checkpoints and gradients that are accumulated."""
    done = _verify("--num-gpus", 2, "--iterations", 2, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples   the same: 32 in 4 iterations" in done.stdout
    assert "verdict   EXACT" in done.stdout
