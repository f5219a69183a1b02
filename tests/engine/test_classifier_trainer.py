"""Whole runs of a classifier in this process, and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.config import CfgNode
from dinoengine.engine import ClassifierTrainer, DefaultPredictor, SSLTrainer, launch, run_command, trainer_class_of
from tests.conftest import TINY, TINY_CLASSIFIER

FINE_TUNING = ["MODEL.CLASSIFIER.FREEZE_BACKBONE", False, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.003]
MIXING = ["MODEL.CLASSIFIER.MIXUP_ALPHA", 0.8, "MODEL.CLASSIFIER.CUTMIX_ALPHA", 1.0]


def _words(folder: Path, *more: object) -> list[str]:
    settings = {**TINY, **TINY_CLASSIFIER, "OUTPUT_DIR": folder}
    return ["--num-gpus", "0", *(f"{key}={value}" for key, value in settings.items()), *(str(word) for word in more)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "data_time")} for row in rows]


def _train(cfg: CfgNode) -> None:
    trainer = ClassifierTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def test_the_config_chooses_the_trainer(classifier_cfg: CfgNode) -> None:
    assert trainer_class_of(classifier_cfg) is ClassifierTrainer
    classifier_cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    assert trainer_class_of(classifier_cfg) is SSLTrainer


@pytest.mark.parametrize(
    "mode", [[], [*FINE_TUNING, *MIXING, "SOLVER.NUM_MICRO_BATCHES", 2]], ids=["linear", "fine-tuning"]
)
def test_a_run_resumes_to_the_bit_and_is_evaluated(mode: list[Any], tmp_path: Path) -> None:
    words = ["SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 4, "MODEL.VIT.DROP_PATH_RATE", 0.2, *mode]
    straight = run_command(None, _words(tmp_path / "a", *words))
    run_command(None, _words(tmp_path / "b", *words))
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000003.pth")  # as if it had been killed after that
    (tmp_path / "b" / "results.json").unlink()
    resumed = run_command(None, _words(tmp_path / "b", *words, "--resume"))
    assert resumed == straight
    assert straight["classification"].keys() == {"top1"}  # three classes
    models = [torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("a", "b")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert _rows(tmp_path / "a") == _rows(tmp_path / "b")

    evaluated = run_command(
        None, _words(tmp_path / "a", *words, "--eval-only", "MODEL.WEIGHTS", tmp_path / "a" / "model_final.pth")
    )
    assert evaluated == straight
    saved = json.loads((tmp_path / "a" / "results.json").read_text())
    assert saved["tables"] == {
        TINY["DATASETS.TEST"]: {"trained classifier": {"classification/top1": straight["classification"]["top1"]}}
    }
    assert run_command(None, _words(tmp_path / "a", *words, "--resume")) == straight  # nothing left to train


def test_only_what_is_to_be_trained_changes(tmp_path: Path) -> None:
    run_command(None, _words(tmp_path / "a"))
    run_command(None, _words(tmp_path / "b", "SOLVER.BASE_LR", 0.02))
    first, second = (torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("a", "b"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_log_has_loss_and_accuracy(tmp_path: Path) -> None:
    run_command(None, _words(tmp_path))
    rows = _rows(tmp_path)
    assert {"loss_cross_entropy", "total_loss", "train_top1", "grad_norm", "lr"} <= rows[0].keys()
    assert all(row["loss_cross_entropy"] == row["total_loss"] for row in rows[:-1])
    assert "teacher_temp" not in rows[0]
    assert "classification/top1" in rows[-1]


def test_the_predictor_gives_logits(classifier_cfg: CfgNode) -> None:
    from PIL import Image

    _train(classifier_cfg)
    classifier_cfg.MODEL.WEIGHTS = f"{classifier_cfg.OUTPUT_DIR}/model_final.pth"
    output = DefaultPredictor(classifier_cfg)(Image.new("RGB", (12, 12)))
    assert output.logits.shape == (1, 3)  # type: ignore[attr-defined]


def test_data_that_do_not_fit_end_the_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(None, _words(tmp_path, "MODEL.CLASSIFIER.NUM_CLASSES", 7))
    assert "NUM_CLASSES is 7, but DATASETS.TRAIN" in capsys.readouterr().err


def _train_all(cfgs: list[CfgNode]) -> None:
    for cfg in cfgs:
        _train(cfg)


@pytest.mark.slow
def test_two_processes_do_what_one_does(classifier_cfg: CfgNode, tmp_path: Path) -> None:
    classifier_cfg.merge_from_list(["LOG.PERIOD", 1, "SOLVER.MAX_ITER", 4])
    classifier_cfg.merge_from_list(["DATASETS.TEST", "synthetic:num_images=7:num_classes=3:size=12"])
    for processes in (1, 2):
        cfgs = []
        for mode, keys in {"linear": [], "fine-tuning": FINE_TUNING}.items():
            cfgs.append(classifier_cfg.clone())
            cfgs[-1].merge_from_list([*keys, "OUTPUT_DIR", str(tmp_path / mode / str(processes))])
        launch(_train_all, processes, args=(cfgs,), device="cpu")
    for mode in ("linear", "fine-tuning"):
        one, two = _rows(tmp_path / mode / "1"), _rows(tmp_path / mode / "2")
        assert len(one) == 5
        for name in ("total_loss", "train_top1"):
            assert [row[name] for row in two[:-1]] == pytest.approx([row[name] for row in one[:-1]], rel=1e-5)
        assert two[-1]["classification/top1"] == one[-1]["classification/top1"]
