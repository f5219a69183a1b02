"""PASCAL VOC 2007 beside a dataset with one class per image in one --eval-only, as the transfer protocol has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinoengine.checkpoint import load_backbone
from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.engine import SSLTrainer, run_command
from dinoengine.evaluation import average_precision, eleven_point_average_precision, extract_features
from tests.conftest import TINY
from tests.voc import draw_labels, write_voc_split

NUM_TRAIN, NUM_TEST = 60, 30
LOGREG = ("TEST.LOGREG.C_LOG10_RANGE", "(-2, 1)", "TEST.LOGREG.NUM_C", 4, "TEST.LOGREG.TOL", 1e-8)
pytestmark = pytest.mark.slow


def _run(folder: Path, *more: object) -> dict[str, Any]:
    overrides = [str(word) for key, value in TINY.items() for word in (key, value)]
    words = ["--num-gpus", "0", *overrides, "OUTPUT_DIR", str(folder), *(str(word) for word in more)]
    results: dict[str, Any] = run_command(SSLTrainer, words)
    return results


def _means(fit: tuple[np.ndarray, np.ndarray], judge: tuple[np.ndarray, np.ndarray], c: float) -> np.ndarray:
    """11-point and plain mAP in percent, of scikit-learn's regressions."""
    found = []
    for k in np.flatnonzero((judge[1] == 1).any(axis=0)):
        used, judged = fit[1][:, k] != 0, judge[1][:, k] != 0
        model = LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(fit[0][used], fit[1][used, k])
        scores, positive = model.decision_function(judge[0][judged]), judge[1][judged, k] == 1
        found.append((eleven_point_average_precision(scores, positive), average_precision(scores, positive)))
    means: np.ndarray = 100 * np.mean(found, axis=0)
    return means


def test_voc_beside_another_dataset_gives_what_scikit_learn_gives(tmp_path: Path, tiny_cfg: CfgNode) -> None:
    labels = draw_labels(NUM_TRAIN, seed=0), draw_labels(NUM_TEST, seed=1)
    train = write_voc_split(tmp_path / "VOC2007", "trainval", labels[0])
    test = write_voc_split(tmp_path / "VOC2007", "test", labels[1], first=NUM_TRAIN)
    single = TINY["DATASETS.TEST"]
    weights = tmp_path / "run" / "model_final.pth"
    _run(tmp_path / "run", "SOLVER.MAX_ITER", 2)
    sets = ("DATASETS.TEST", f"('{single}','{test}')", "TEST.TRAIN_PER_TEST", f"('{TINY['DATASETS.TRAIN']}','{train}')")
    evaluated = ("--eval-only", "MODEL.WEIGHTS", weights, "TEST.EVALUATORS", "('logreg',)", *sets, *LOGREG)
    results = _run(tmp_path / "eval", *evaluated)

    model = load_backbone(str(weights))
    rows = [
        extract_features(model, build_test_loader(tiny_cfg, name)).features.double().numpy() for name in (train, test)
    ]
    order = torch.randperm(NUM_TRAIN, generator=torch.Generator().manual_seed(0)).numpy()
    held_out, keep = order[: NUM_TRAIN // 10], order[NUM_TRAIN // 10 :]
    fit, judge = ((rows[0][part], labels[0][part]) for part in (keep, held_out))
    chosen = max((0.01, 0.1, 1.0, 10.0), key=lambda c: _means(fit, judge, c)[0])
    expected = _means((rows[0], labels[0]), (rows[1], labels[1]), chosen)
    of_voc = results[test]["logreg"]
    assert [of_voc["map_11_point"], of_voc["map"]] == pytest.approx(expected.tolist(), abs=1e-6)
    assert 10 < of_voc["map"] < 90
    assert results[single]["logreg"].keys() == {"top1", "mean_per_class"}

    records = [json.loads(path.read_text()) for path in (tmp_path / "eval" / "eval").glob("*.json")]
    (record,) = [record for record in records if record["dataset"] == test]
    assert record["results"]["logreg"] == of_voc
    assert record["num_images"] == NUM_TEST
    assert record["protocol"]["logreg"]["train"] == [train]
    assert record["protocol"]["logreg"]["num_train_images"] == NUM_TRAIN
