"""tools/train_net.py as a user runs it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


def _command(*words: object, tool: str = "tools/train_net.py") -> list[str]:
    overrides = [str(w) for key, value in TINY.items() if key != "MODEL.DEVICE" for w in (key, value)]
    return [sys.executable, *tool.split(), *overrides, *(str(w) for w in words)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(*words: object, tool: str = "tools/train_net.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*words, tool=tool), cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=120
    )


def test_kill_resume_finish_and_evaluate(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("OUTPUT_DIR", out, "SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.MAX_ITER", 80)
    process = subprocess.Popen(
        _command("--num-gpus", 0, *words), cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (out / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = (out / "last_checkpoint").read_text()
    start = torch.load(out / last, weights_only=True)["iteration"] + 1
    assert 0 < start < 80

    again = _run("--num-gpus", 0, *words)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr

    resumed = _run("--num-gpus", 0, "--resume", *words)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Training from iteration {start} to 80" in resumed.stdout
    assert "trained teacher" in resumed.stdout
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(81))

    evaluated = _run(
        "--eval-only", "--config-file", out / "config.yaml", "MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", out
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"Weights: {out / 'model_final.pth'}" in evaluated.stdout
    trained, of_file = (
        [line.split() for line in run.stdout.splitlines() if line.startswith("top1_k")] for run in (resumed, evaluated)
    )
    assert len(trained) == len(of_file) > 0
    assert trained == of_file


def test_two_processes_by_spawn_and_by_torchrun_give_the_same(tmp_path: Path) -> None:
    cpu = ("MODEL.DEVICE", "cpu", "LOG.PERIOD", 1, "SOLVER.MAX_ITER", 3)
    spawned = _run("--num-gpus", 2, *cpu, "OUTPUT_DIR", tmp_path / "spawn")
    assert spawned.returncode == 0, spawned.stderr
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --standalone tools/train_net.py"
    joined = _run(*cpu, "OUTPUT_DIR", tmp_path / "torchrun", tool=torchrun)
    assert joined.returncode == 0, joined.stderr
    losses = [
        [json.loads(line).get("total_loss") for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("spawn", "torchrun")
    ]
    assert losses[0] == losses[1]
    assert (tmp_path / "spawn" / "log.txt.rank1").exists()
    assert spawned.stdout.count("Starting from scratch") == 1


def test_wrong_input_ends_at_once_with_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.jpg").write_text("no image")
    cases = [
        (("SOLVER.MAX_ITR", 3), "there is no key 'SOLVER.MAX_ITR' (did you mean 'SOLVER.MAX_ITER'?)"),
        (("--num-gpus", 2, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "folder:/no/such"), "/no/such does not exist"),
    ]
    for words, message in cases:
        done = _run("OUTPUT_DIR", tmp_path / "out", *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        assert done.stderr.count("error:") == 1

    broken = _run("OUTPUT_DIR", tmp_path / "out", "DATASETS.TRAIN", f"folder:{folder}", "DATASETS.TEST", "()")
    assert broken.returncode == 2
    assert f"{folder}/notes.jpg: not one of JPEG, PNG" in broken.stderr
    assert "Traceback" not in broken.stderr + broken.stdout
