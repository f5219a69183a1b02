"""From a backbone to an accuracy, by the commands a user gives and the config as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.config import get_cfg
from dinoengine.engine import run_command
from dinoengine.modeling import build_model
from tests.checkpoint.models import random_entries
from tests.tools.tools import load_tool

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow

SHORT = {
    "SOLVER.MAX_ITER": 60,
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.CHECKPOINT_PERIOD": 25,
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": 0,
    "INPUT.GLOBAL_CROPS.SCALE": "(0.9,1)",
    "INPUT.CROP_RATIO": "(1,1)",
    "TEST.EVAL_PERIOD": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "LOG.TENSORBOARD": False,
    "LOG.PERIOD": 20,
}


def _run(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, *(str(word) for word in words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _losses(folder: Path) -> list[Any]:
    return [json.loads(line).get("total_loss") for line in (folder / "metrics.json").read_text().splitlines()]


def test_fine_tuning_is_ahead_of_a_linear_head_after_as_many_iterations(tmp_path: Path) -> None:
    (tmp_path / "linear").mkdir()
    (tmp_path / "finetune").mkdir()
    linear = _convert_train_resume_and_evaluate_as_written("linear", 0.5, tmp_path / "linear")
    finetune = _convert_train_resume_and_evaluate_as_written("finetune", 0.02, tmp_path / "finetune")
    assert finetune > linear + 5
    assert linear > 35  # chance is 10


def _convert_train_resume_and_evaluate_as_written(mode: str, lr: float, tmp_path: Path) -> float:
    """The whole way of a classifier of a quickstart backbone; returns its top-1 in percent."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "quickstart" / "digits.yaml"))
    torch.save({"model": random_entries(build_model(cfg)), "config": cfg.dump()}, tmp_path / "in.pth")
    overrides = {**SHORT, "SOLVER.BASE_LR": lr, "SOLVER.WARMUP_ITERS": 5 if mode == "finetune" else 0}
    words = ["--mode", mode, "--last-blocks", 4, "--mean-patch"]
    words += ["--train", "digits:split=train", "--test", "digits:split=test", tmp_path / "in.pth", tmp_path / "cls.pth"]
    words += [f"{key}={value}" for key, value in overrides.items()]
    if mode == "linear":
        assert "max abs difference" in _run("tools/convert_to_classifier.py", *words)
    else:  # once in a process of its own is enough
        load_tool("convert_to_classifier").main([str(word) for word in words])

    config, run = tmp_path / "cls.yaml", tmp_path / "cls"
    out = _run("tools/train_net.py", "--config-file", config)
    assert re.search(r"\nclassification +unit +trained classifier\n.*\ntop1 +% +[0-9.]+\ntop5 +% ", out)
    results = json.loads((run / "results.json").read_text())["results"]["classification"]
    assert results["top5"] > results["top1"]
    losses, final = _losses(run), torch.load(run / "model_final.pth")["model"]

    # In this process from here on, which is quicker: killed after iteration 49, and resumed with the same command.
    (run / "last_checkpoint").write_text("model_0000049.pth")
    (run / "results.json").unlink()
    (run / "model_final.pth").unlink()
    assert run_command(None, ["--config-file", str(config), "--num-gpus", "0", "--resume"])["classification"] == results
    again = torch.load(run / "model_final.pth")["model"]
    assert all(torch.equal(value, again[name]) for name, value in final.items())
    assert _losses(run) == losses
    evaluated = run_command(
        None,
        ["--config-file", str(config), "--num-gpus", "0", "--eval-only", "MODEL.WEIGHTS", str(run / "model_final.pth")],
    )
    assert evaluated["classification"] == results
    return float(results["top1"])
