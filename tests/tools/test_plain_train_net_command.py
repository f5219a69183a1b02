"""What the plain loop refuses, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint.layouts import read_weights
from dinoengine.config import CfgNode
from dinoengine.engine import default_argument_parser
from tests.tools.test_plain_train_net import plain_train_net


def _run(cfg: CfgNode, *words: str) -> None:
    cfg.freeze()
    plain_train_net.main(cfg, default_argument_parser().parse_args(list(words)))


def test_it_refuses_to_resume(tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _run(tiny_cfg, "--resume")
    assert stopped.value.code == 2
    assert "cannot --resume" in capsys.readouterr().err
    assert not Path(tiny_cfg.OUTPUT_DIR).exists()  # refused before anything is touched


def test_it_refuses_a_classifier(classifier_cfg: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run(classifier_cfg)
    assert "train a classifier with train_net.py" in capsys.readouterr().err
    assert not Path(classifier_cfg.OUTPUT_DIR).exists()


def test_it_does_not_overwrite_a_run(tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 2
    _run(tiny_cfg.clone())
    with pytest.raises(SystemExit) as stopped:
        _run(tiny_cfg.clone())
    assert stopped.value.code == 2
    assert "already holds a run" in capsys.readouterr().err


def test_its_weights_are_evaluated_like_those_of_the_trainer(
    tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 3
    _run(tiny_cfg.clone())
    saved = torch.load(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 2
    weights = read_weights(str(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth"))
    assert weights.spec.num_heads == tiny_cfg.MODEL.VIT.NUM_HEADS  # 8 channels each: the config in the file says it

    tiny_cfg.MODEL.WEIGHTS = str(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth")
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "evaluation")
    before = set(Path(tmp_path).rglob("*.pth"))
    _run(tiny_cfg.clone(), "--eval-only")
    assert set(Path(tmp_path).rglob("*.pth")) == before  # --eval-only trains nothing


@pytest.mark.parametrize("override", ["SOLVER.AMP.ENABLED True", "SOLVER.NUM_MICRO_BATCHES 2"])
def test_it_refuses_settings_that_it_would_ignore(tiny_cfg: CfgNode, override: str) -> None:
    """A run that says bf16 in its config.yaml and computed in fp32 is a wrong record."""
    tiny_cfg.SOLVER.MAX_ITER = 1
    tiny_cfg.MODEL.LOSS.KOLEO_GROUP_SIZE = 2
    tiny_cfg.merge_from_list(override.split())
    with pytest.raises(SystemExit):
        _run(tiny_cfg)
