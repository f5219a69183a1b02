"""tools/convert_to_classifier.py: its flags reach the conversion, and mistakes end with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint.convert import save_weights
from dinoengine.config import get_cfg
from dinoengine.data import build_dataset
from dinoengine.engine import run_command
from tests.checkpoint.models import random_weights
from tests.tools.tools import load_tool

tool = load_tool("convert_to_classifier")


@pytest.fixture
def source(tmp_path: Path) -> str:
    save_weights(random_weights(), str(tmp_path / "in.pth"), "meta")
    return str(tmp_path / "in.pth")


def test_flags_and_overrides(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "cls.pth"
    words = ["--mode", "finetune", source, "--mean-patch", str(target), "SOLVER.MAX_ITER", "20", "SEED=3"]
    assert tool.main(["--train", "digits:split=train", "--test", "digits:split=test", *words]) == 0
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "new" / "cls.yaml"))
    assert (cfg.MODEL.CLASSIFIER.NUM_CLASSES, cfg.MODEL.CLASSIFIER.MEAN_PATCH) == (10, True)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("digits:split=train",), ("digits:split=test",))
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MAX_ITER, cfg.SEED) == ("AdamW", 20, 3)
    assert (str(target), str(target.parent / "cls")) == (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
    assert "max abs difference" in capsys.readouterr().out


def test_export(source: str, tmp_path: Path) -> None:
    tool.main(["--num-classes", "4", source, str(tmp_path / "cls.pth")])
    tool.main(["--export-head", str(tmp_path / "cls.pth"), str(tmp_path / "head.pth")])
    head = torch.load(tmp_path / "head.pth", weights_only=True)
    assert {name: list(value.shape) for name, value in head.items()} == {"weight": [4, 64], "bias": [4]}


def test_a_head_that_came_without_training_data_is_evaluated_as_written(source: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(10, 128), "bias": torch.eye(10)[3]}, tmp_path / "head.pth")  # always a 3
    head, target = str(tmp_path / "head.pth"), str(tmp_path / "cls.pth")
    keys = ["DATALOADER.NUM_WORKERS=0", "INPUT.TEST.CROP_SIZE_PX=14"]
    tool.main(["--linear-head", head, "--test", "digits:split=test", source, target, *keys])
    results = run_command(None, ["--config-file", str(tmp_path / "cls.yaml"), "--num-gpus", "0", "--eval-only"])
    labels = [build_dataset("digits:split=test").label(i) for i in range(360)]
    top5 = sum(labels.count(digit) for digit in (3, 0, 1, 2, 4))  # of equal logits the first classes
    expected = {"top1": labels.count(3) / 3.6, "top5": top5 / 3.6}
    assert results["classification"] == pytest.approx(expected)


def test_mistakes_end_with_one_line(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([source, str(tmp_path / "cls.pth")], "error: How many classes?"),
        ([str(tmp_path / "no.pth"), str(tmp_path / "cls.pth"), "--num-classes", "2"], "no.pth does not exist"),
        (["--export-head", source, str(tmp_path / "head.pth")], "has no linear head"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool.main(words)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
