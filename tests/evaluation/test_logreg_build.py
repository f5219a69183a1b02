from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    LogregEvaluator,
    MultiLabelLogregEvaluator,
    UnsuitableTestSetError,
    build_evaluator,
    build_logreg_evaluator,
)
from tests.voc import draw_labels, write_voc_split

SINGLE = "synthetic:num_images=6:num_classes=3:size=8"


def test_each_test_set_gets_the_regression_of_its_labels(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    train = write_voc_split(tmp_path, "trainval", draw_labels(20, seed=0))
    test = write_voc_split(tmp_path, "test", draw_labels(20, seed=1), first=20)
    tiny_cfg.DATASETS.TEST, tiny_cfg.TEST.TRAIN_PER_TEST = (SINGLE, test), (f"{SINGLE}:seed=1", train)
    tiny_cfg.TEST.EVALUATORS = ("logreg",)
    kinds = [type(build_evaluator(tiny_cfg, name).evaluators[0]) for name in tiny_cfg.DATASETS.TEST]
    assert kinds == [LogregEvaluator, MultiLabelLogregEvaluator]


def test_a_multi_label_training_set_does_not_fit_a_test_set_with_one_class_per_image(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    tiny_cfg.TEST.LOGREG.TRAIN = (write_voc_split(tmp_path, "trainval", draw_labels(20, seed=0)),)
    with pytest.raises(ValueError, match=r"needs one class per image, and its training set .* is multi-label"):
        build_logreg_evaluator(tiny_cfg, SINGLE, build_test_loader)


@pytest.mark.parametrize("name", ["knn", "linear", "classification"])
def test_other_evaluators_refuse_multi_label_sets_and_name_logreg(tiny_cfg: CfgNode, tmp_path: Path, name: str) -> None:
    test = write_voc_split(tmp_path, "test", draw_labels(20, seed=0))
    tiny_cfg.merge_from_list(["TEST.EVALUATORS", (name,), "MODEL.CLASSIFIER.NUM_CLASSES", 3])
    message = rf"'{name}' needs one class per image, and the test set .* is multi-label\. .* for the evaluator 'logreg'"
    with pytest.raises(UnsuitableTestSetError, match=message):
        build_evaluator(tiny_cfg, test)


@pytest.mark.parametrize("name", ["knn", "linear", "classification"])
def test_other_evaluators_leave_out_multi_label_test_sets_beside_logreg(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    train = write_voc_split(tmp_path, "trainval", draw_labels(20, seed=0))
    test = write_voc_split(tmp_path, "test", draw_labels(20, seed=1), first=20)
    tiny_cfg.DATASETS.TRAIN = (f"{SINGLE}:seed=1",)
    tiny_cfg.DATASETS.TEST, tiny_cfg.TEST.TRAIN_PER_TEST = (SINGLE, test), (f"{SINGLE}:seed=1", train)
    tiny_cfg.merge_from_list(["TEST.EVALUATORS", (name, "logreg"), "MODEL.CLASSIFIER.NUM_CLASSES", 3])
    caplog.set_level(logging.INFO, logger="dinoengine")
    kinds = [[type(e) for e in build_evaluator(tiny_cfg, dataset).evaluators] for dataset in tiny_cfg.DATASETS.TEST]
    assert len(kinds[0]) == 2
    assert kinds[1] == [MultiLabelLogregEvaluator]
    assert f"The evaluator '{name}' leaves out '{test}': " in caplog.text


def test_a_multi_label_validation_set_is_an_error_beside_logreg_too(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """Only what is tested decides what is left out."""
    tiny_cfg.TEST.LINEAR.VAL = (write_voc_split(tmp_path, "val", draw_labels(20, seed=0)),)
    tiny_cfg.merge_from_list(["DATASETS.TEST", (SINGLE, f"{SINGLE}:seed=2"), "TEST.EVALUATORS", ("linear", "knn")])
    tiny_cfg.DATASETS.TRAIN = (f"{SINGLE}:seed=1",)
    with pytest.raises(ValueError, match="needs one class per image, and the validation set .* is multi-label"):
        build_evaluator(tiny_cfg, SINGLE)
