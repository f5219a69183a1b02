"""The short version of benchmarks/reliability.py: real kills, damaged files, the volume of an hour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_nothing_is_lost() -> None:
    command = "benchmarks/reliability.py --kills 1 --mutations 60 --iterations 3600 --seed 1"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ended by SIGKILL and resumed, 1 process(es): 1 of 1 bitwise equal") == 1
    assert done.stdout.count("1 of 1 bitwise equal") == 4
    assert done.stdout.count("0 of 60 wrong") == 2
    assert "verdict: nothing was lost" in done.stdout
