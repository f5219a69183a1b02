"""tools/plan.py: the words of the command line reach the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinoengine.config import CfgNode
from tests.tools.tools import load_tool

plan = load_tool("plan")


def test_a_plan_with_a_probe(tiny_cfg: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    plan.main(["--config-file", str(path), "--num-gpus", "2", "--probe", "1", "--dataset-size", "40"])
    out = capsys.readouterr().out
    assert "probe (2 images, fp32, cpu" in out
    assert "kept for the backward pass: estimated" in out
    assert "1.0 passes over 40" in out
    assert "GPU hours" in out
    assert not (tmp_path / "run").exists()


def test_wrong_input_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan.main(["--num-gpus", "0", "DATASETS.TRAIN", "synthetic"])
    assert end.value.code == 2


@pytest.mark.parametrize("flag", ["--dataset-size", "--images-per-second", "--probe", "--gpu-memory"])
def test_nothing_is_no_amount(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan.main([flag, "0", "DATASETS.TRAIN", "synthetic"])
    assert end.value.code == 2
    assert f"{flag} must be above 0 (or left out), got 0" in capsys.readouterr().err
