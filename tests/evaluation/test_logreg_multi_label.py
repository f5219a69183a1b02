from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset, build_test_loader
from dinoengine.evaluation import (
    LogregSettings,
    MultiLabelLogregEvaluator,
    eleven_point_average_precision,
    inference_on_dataset,
)
from dinoengine.evaluation.logreg import split_held_out
from dinoengine.evaluation.logreg_multi_label import (
    MultiLabelRows,
    best_c,
    build_multi_label_logreg,
    fit_and_judge,
    label_matrix,
    mean_precisions,
)
from tests.evaluation.fakes import identity_features, make_loader
from tests.voc import draw_labels, write_voc_split

DIM, CLASSES = 5, 3
CS = tuple(10.0 ** np.linspace(-3, 2, 11))
SETTINGS = LogregSettings(cs=CS, tol=1e-8, held_out=0.3)


def _rows(seed: int, count: int) -> MultiLabelRows:
    """A class is shown on one side of a plane, with noise; a tenth does not count."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, DIM)).astype(np.float32).astype(np.float64)
    planes = np.random.default_rng(99).normal(size=(DIM, CLASSES))
    labels = np.where(features @ planes + 1.5 * rng.normal(size=(count, CLASSES)) > 0.5, 1, -1).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = 0
    return MultiLabelRows(features, labels)


def _loader(rows: MultiLabelRows) -> Any:
    return make_loader(torch.tensor(rows.features, dtype=torch.float32), None, batch_size=16)


def _evaluate(
    train: MultiLabelRows, test: MultiLabelRows, val: MultiLabelRows | None = None, settings: LogregSettings = SETTINGS
) -> tuple[dict[str, float], MultiLabelLogregEvaluator]:
    evaluator = MultiLabelLogregEvaluator(
        _loader(train),
        settings,
        train_labels=train.labels,
        test_labels=test.labels,
        val_loader=None if val is None else _loader(val),
        val_labels=None if val is None else val.labels,
    )
    return inference_on_dataset(identity_features(DIM), _loader(test), evaluator)["logreg"], evaluator


def _by_hand(fit: MultiLabelRows, judge: MultiLabelRows, c: float) -> tuple[float, float]:
    """(11-point, plain) mAP of cold starts, image by image without those that do not count."""
    found = []
    for k in range(CLASSES):
        used = [i for i, labels in enumerate(fit.labels) if labels[k] != 0]
        judged = [i for i, labels in enumerate(judge.labels) if labels[k] != 0]
        model = LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(fit.features[used], fit.labels[used, k])
        scores, positive = model.decision_function(judge.features[judged]), judge.labels[judged, k] == 1
        found.append((eleven_point_average_precision(scores, positive), average_precision_score(positive, scores)))
    eleven_point, plain = np.mean(found, axis=0)
    return 100 * eleven_point, 100 * plain


def test_results_are_those_of_the_protocol_written_out() -> None:
    train, test = _rows(0, 150), _rows(1, 120)
    keep, held_out = split_held_out(train.labels, 0.3, 0)
    fit, judge = (MultiLabelRows(train.features[rows], train.labels[rows]) for rows in (keep, held_out))
    chosen = CS[int(np.argmax([_by_hand(fit, judge, c)[0] for c in CS]))]
    results, evaluator = _evaluate(train, test)
    assert (results["map_11_point"], results["map"]) == pytest.approx(_by_hand(train, test, chosen), abs=1e-6)
    assert 30 < results["map"] < 95
    assert abs(results["map"] - results["map_11_point"]) > 0.1
    protocol = evaluator.protocol()["logreg"]
    assert (protocol["num_train_images"], protocol["num_val_images"], protocol["held_out"]) == (150, 0, 0.3)
    assert "multi-label" in protocol["labels"]


def test_a_validation_set_chooses_c_and_is_fitted_to_at_the_end() -> None:
    train, val, test = _rows(0, 60), _rows(2, 50), _rows(1, 90)
    chosen = CS[int(np.argmax([_by_hand(train, val, c)[0] for c in CS]))]
    everything = MultiLabelRows(*(np.concatenate(parts) for parts in zip(train, val, strict=True)))
    results, evaluator = _evaluate(train, test, val)
    assert (results["map_11_point"], results["map"]) == pytest.approx(_by_hand(everything, test, chosen), abs=1e-6)
    protocol = evaluator.protocol()["logreg"]
    assert (protocol["num_val_images"], protocol["held_out"], protocol["seed"]) == (50, 0, None)


def test_images_that_do_not_count_for_a_class_change_nothing_for_it() -> None:
    train, test = _rows(0, 80), _rows(1, 60)
    (alone,) = fit_and_judge(_only(train, 0), _only(test, 0), [(1.0,)], SETTINGS)
    for rows in (train, test):
        rows.features[rows.labels[:, 0] == 0] = 1e3
    (changed,) = fit_and_judge(_only(train, 0), _only(test, 0), [(1.0,)], SETTINGS)
    assert changed == alone
    (train.labels[:, 0])[train.labels[:, 0] == 0] = -1
    (counted,) = fit_and_judge(_only(train, 0), _only(test, 0), [(1.0,)], SETTINGS)
    assert counted != alone


def _only(rows: MultiLabelRows, k: int) -> MultiLabelRows:
    return MultiLabelRows(rows.features, rows.labels[:, [k]])


def test_of_equally_good_values_of_c_the_smallest_is_taken_and_classes_count_alike() -> None:
    rows = MultiLabelRows(
        np.repeat(np.eye(2) * 10, 4, axis=0), np.repeat([[1, -1], [-1, 1]], 4, axis=0).astype(np.int8)
    )
    fits = fit_and_judge(rows, rows, [(10.0, 100.0), (0.1, 1.0)], SETTINGS)
    assert best_c(fits) == 0.1
    assert [(found.c, found.class_number) for found in fits[:3]] == [(0.1, 0), (0.1, 1), (1.0, 0)]
    wrong = fits[0]._replace(precision=fits[0].precision._replace(average=0.5, eleven_point=0.25))
    means = mean_precisions([wrong, *fits[1:]])
    assert means[0.1] == pytest.approx((0.75, 0.625))
    assert best_c([wrong, *fits[1:]]) == 1.0


def test_a_class_without_training_images_ranks_nothing_and_one_without_test_images_is_left_out() -> None:
    train, test = _rows(0, 80), _rows(1, 60)
    train.labels[:, 1] = -1
    test.labels[:, 2] = -1
    fits = fit_and_judge(train, test, [(1.0,)], SETTINGS)
    assert [(found.class_number, found.converged) for found in fits] == [(0, True), (1, None)]
    share = (test.labels[:, 1] == 1).sum() / (test.labels[:, 1] != 0).sum()
    assert fits[1].precision == pytest.approx((share, share))


def test_no_image_that_shows_a_class() -> None:
    rows = _rows(0, 40)
    with pytest.raises(ValueError, match="needs images that show a class, and none of 40 does"):
        fit_and_judge(rows, MultiLabelRows(rows.features, -np.ones_like(rows.labels)), [(1.0,)], SETTINGS)


def test_fits_that_end_too_early_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _evaluate(_rows(0, 60), _rows(1, 40), settings=LogregSettings(cs=(0.01, 0.1), max_iter=2, held_out=0.3))
    assert [m for m in caplog.messages if "converge" in m] == [
        "Logistic regression: 9 of 9 fits did not converge (TEST.LOGREG.MAX_LBFGS_ITERS 2, TEST.LOGREG.TOL 1e-12)."
    ]


class Listed(ImageDataset):
    """Labels without images."""

    def __init__(self, names: list[str], labels: list[list[int]]) -> None:
        self.multi_label_class_names: list[str] = names
        self._labels = np.array(labels, dtype=np.int8)

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, index: int) -> Any:
        raise AssertionError("labels are known without the image")

    def multi_label(self, index: int) -> np.ndarray:
        labels: np.ndarray = self._labels[index]
        return labels


def test_classes_meet_by_name_and_an_unknown_one_counts_for_no_image() -> None:
    dataset = Listed(["dog", "cat", "fox"], [[1, -1, 0], [-1, 1, 1]])
    assert label_matrix(dataset, ["cat", "cow", "dog"]).tolist() == [[-1, 0, 1], [1, 0, -1]]
    with pytest.raises(ValueError, match="no class in common"):
        label_matrix(dataset, ["cow"])


def _voc_cfg(cfg: CfgNode) -> CfgNode:
    """Crops are the images themselves, in grey; features are their pixels."""
    cfg.merge_from_list(["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", (0.5,), "MODEL.PIXEL_STD", (0.5,)])
    cfg.merge_from_list(["INPUT.TEST.RESIZE_PX", 20, "INPUT.TEST.CROP_SIZE_PX", (20,), "TEST.LOGREG.HELD_OUT", 0.4])
    cfg.merge_from_list(["TEST.LOGREG.C_LOG10_RANGE", (-6.0, -4.0), "TEST.LOGREG.NUM_C", 2])
    return cfg


def test_pixels_that_tell_the_classes_are_always_right(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """Were difficult images judged, as positive or as negative, then half of them would be wrong."""
    cfg, test_labels = _voc_cfg(tiny_cfg), draw_labels(25, seed=1)
    cfg.TEST.LOGREG.TRAIN = (write_voc_split(tmp_path, "trainval", draw_labels(120, seed=0)),)
    test = write_voc_split(tmp_path, "test", test_labels, first=120)
    assert (test_labels == 0).any(axis=0).sum() > 10
    evaluator = build_multi_label_logreg(cfg, test, build_test_loader)
    results = inference_on_dataset(identity_features(400), build_test_loader(cfg, test), evaluator)
    assert results == {"logreg": {"map_11_point": 100.0, "map": 100.0}}


def test_training_and_validation_sets_must_be_multi_label_too(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    test = write_voc_split(tmp_path, "test", draw_labels(20, seed=0))
    tiny_cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"'logreg' needs labels, and its training set \(none is named\)"):
        build_multi_label_logreg(tiny_cfg, test, build_test_loader)
    tiny_cfg.DATASETS.TRAIN = ("digits",)
    with pytest.raises(ValueError, match=r"is multi-label, so its training set \['digits'\] of the evaluator 'logreg'"):
        build_multi_label_logreg(tiny_cfg, test, build_test_loader)
    tiny_cfg.merge_from_list(["TEST.LOGREG.TRAIN", (test,), "TEST.LOGREG.VAL", ("digits",)])
    with pytest.raises(ValueError, match=r"so the validation set \['digits'\] of the evaluator 'logreg' must be, too"):
        build_multi_label_logreg(tiny_cfg, test, build_test_loader)


def test_classes_without_images_and_shared_images_are_said(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = draw_labels(20, seed=0)
    labels[:, 3] = -1
    tiny_cfg.DATASETS.TRAIN = (write_voc_split(tmp_path, "train", labels),)
    build_multi_label_logreg(tiny_cfg, write_voc_split(tmp_path, "test", labels, first=10), build_test_loader)
    messages = "\n".join(caplog.messages)
    assert "10 of 20 images of the test set" in messages
    assert "1 class(es) have no training image that shows them, or none that does not" in messages
    assert "so all images get the same score: boat." in messages
    assert "1 class(es) are not in the means, as no test image shows them: boat." in messages
