from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    LogregEvaluator,
    LogregSettings,
    build_logreg_evaluator,
    inference_on_dataset,
    mean_per_class,
)
from dinoengine.evaluation.logreg import CHAIN, Regression, Rows, choose_c, split_held_out
from dinoengine.modeling import build_model
from tests.evaluation.fakes import identity_features, make_loader

DIM, CLASSES = 4, 7
NAMES = [f"class {i}" for i in range(CLASSES)]
SETTINGS = LogregSettings(cs=tuple(10.0 ** np.linspace(-3, 2, 12)), tol=1e-6)


def _rows(seed: int, count: int, classes: int = CLASSES) -> Rows:
    """Clusters that overlap, so that neither 0 nor 100 percent is right."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, DIM))
    labels = rng.integers(classes, size=count)
    return Rows((centres[labels] + 1.5 * rng.normal(size=(count, DIM))).astype(np.float32).astype(np.float64), labels)


def _loader(rows: Rows) -> Any:
    return make_loader(torch.tensor(rows.features, dtype=torch.float32), torch.tensor(rows.labels), batch_size=16)


def _evaluate(
    train: Rows, test: Rows, val: Rows | None = None, settings: LogregSettings = SETTINGS
) -> tuple[dict[str, float], LogregEvaluator]:
    evaluator = LogregEvaluator(
        _loader(train),
        settings,
        class_names=NAMES,
        train_labels=range(CLASSES),
        val_loader=None if val is None else _loader(val),
        val_labels=range(CLASSES),
    )
    return inference_on_dataset(identity_features(DIM), _loader(test), evaluator)["logreg"], evaluator


def _by_hand(fit: Rows, judge: Rows, everything: Rows, test: Rows) -> dict[str, float]:
    """The protocol with one cold start per C."""
    accuracies = [LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(*fit).score(*judge) for c in SETTINGS.cs]
    model = LogisticRegression(C=SETTINGS.cs[int(np.argmax(accuracies))], max_iter=1000, tol=1e-6).fit(*everything)
    probabilities = model.predict_proba(test.features)
    right = model.predict(test.features) == test.labels
    ranks = (probabilities > probabilities[np.arange(len(test.labels)), test.labels][:, None]).sum(1)
    recalls = [right[test.labels == c].mean() for c in range(CLASSES)]
    return {"top1": 100 * right.mean(), "top5": 100 * (ranks < 5).mean(), "mean_per_class": 100 * np.mean(recalls)}


def test_results_are_those_of_the_protocol_written_out() -> None:
    train, test = _rows(0, 120), _rows(1, 90)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0)).numpy()
    held_out, keep = order[:12], order[12:]
    fit, judge = (Rows(*(part[rows] for part in train)) for rows in (keep, held_out))
    results, evaluator = _evaluate(train, test)
    assert results == pytest.approx(_by_hand(fit, judge, train, test))
    assert 20 < results["top1"] < results["top5"] < 100
    assert results["top1"] != results["mean_per_class"]
    protocol = evaluator.protocol()["logreg"]
    assert (protocol["num_train_images"], protocol["num_val_images"], protocol["held_out"]) == (120, 0, 0.1)


def test_a_validation_set_chooses_c_and_is_fitted_to_at_the_end() -> None:
    train, val, test = _rows(0, 60), _rows(2, 50), _rows(1, 90)
    everything = Rows(*(np.concatenate(parts) for parts in zip(train, val, strict=True)))
    results, evaluator = _evaluate(train, test, val)
    assert results == pytest.approx(_by_hand(train, val, everything, test))
    protocol = evaluator.protocol()["logreg"]
    assert (protocol["num_val_images"], protocol["held_out"], protocol["seed"]) == (50, 0, None)


def test_starting_from_the_solution_before_does_not_change_the_optimum() -> None:
    rows, probe = _rows(0, 100), _rows(1, 50)
    regression = Regression(LogregSettings(tol=1e-10))
    for c in (0.01, 0.1, 1.0):
        regression.fit(rows, c)
    cold = LogisticRegression(C=1.0, max_iter=1000, tol=1e-10).fit(*rows)
    np.testing.assert_allclose(regression._model.coef_, cold.coef_, atol=1e-5)
    assert (regression.hits(probe, 1) == (cold.predict(probe.features) == probe.labels)).all()


def test_of_equally_good_values_of_c_the_smallest_is_taken() -> None:
    separable = Rows(np.repeat(np.eye(2) * 10, 4, axis=0), np.repeat([0, 1], 4))
    cs = tuple(10.0 ** np.linspace(-1, 2, 2 * CHAIN))
    assert choose_c(separable, separable, LogregSettings(cs=cs)).c == cs[0]


def test_the_last_fit_starts_from_the_solution_that_c_was_chosen_by() -> None:
    everything, judge = _rows(0, 400), _rows(1, 100)
    fit = Rows(*(part[:360] for part in everything))
    choice = choose_c(fit, judge, SETTINGS)
    of_its_own = Regression(SETTINGS)
    of_its_own.fit(fit, choice.c)
    assert (choice.regression.hits(judge, 3) == of_its_own.hits(judge, 3)).all()  # not that of the last C of its chain
    cold = Regression(SETTINGS)
    cold.fit(everything, choice.c)
    assert choice.regression.has_classes_of(everything)
    assert not choice.regression.has_classes_of(_rows(0, 60, classes=6))
    choice.regression.fit(everything, choice.c)
    np.testing.assert_allclose(choice.regression._model.coef_, cold._model.coef_, atol=1e-4)
    assert choice.regression._model.n_iter_ < cold._model.n_iter_


def test_mean_per_class_by_hand() -> None:
    hits = np.array([True, True, True, False, True, False])
    labels = np.array([0, 0, 0, 0, 5, 5])
    assert mean_per_class(hits, labels) == pytest.approx((75 + 50) / 2)
    assert hits.mean() * 100 == pytest.approx(66.67, abs=0.01)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_class_that_was_not_fitted_to_is_never_right(classes: int) -> None:
    rows = _rows(0, 60, classes)
    shifted = Rows(rows.features, rows.labels * 2)  # classes 0, 2 (and 4)
    regression = Regression(SETTINGS)
    regression.fit(shifted, 1.0)
    assert regression.hits(shifted, 1).mean() > 0.5
    assert regression.hits(shifted, classes).all()
    assert not regression.hits(Rows(rows.features, np.ones(60, dtype=int)), classes).any()


def test_a_class_whose_only_image_is_held_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    train, test = _rows(0, 60, classes=6), _rows(1, 40)
    held_out = int(torch.randperm(60, generator=torch.Generator().manual_seed(0))[0])
    train.labels[held_out] = 6
    _evaluate(train, test)
    messages = [message for message in caplog.messages if "held out" in message]
    assert len(messages) == 1
    assert "all images of 1 class(es) are held out while C is chosen, e.g. of class 6" in messages[0]


def test_fits_that_end_too_early_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinoengine"):
        _evaluate(_rows(0, 60), _rows(1, 40))
        assert caplog.messages == []
        _evaluate(_rows(0, 60), _rows(1, 40), settings=LogregSettings(cs=(0.01, 0.1, 1.0), max_iter=2))
    assert caplog.messages[-1:] == [
        "Logistic regression: 4 of 4 fits did not converge (TEST.LOGREG.MAX_LBFGS_ITERS 2, TEST.LOGREG.TOL 1e-12)."
    ]


def test_the_largest_c_of_the_grid_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dinoengine"):
        _evaluate(_rows(0, 60), _rows(1, 40), settings=LogregSettings(cs=(1e-9,), tol=1e-6))
    assert caplog.messages == ["Logistic regression: C 1e-09 is the largest of TEST.LOGREG; a larger may be better."]


def test_one_class_is_not_enough() -> None:
    train = _rows(0, 60)
    train.labels[:] = 3
    with pytest.raises(ValueError, match=r"two classes or more to fit to, and there are only images of \['class 3'\]"):
        _evaluate(train, _rows(1, 40))


def test_too_few_images_to_hold_some_out() -> None:
    keep, held_out = split_held_out(np.arange(10), 0.1, 0)
    assert sorted([*keep, *held_out]) == list(range(10))
    assert len(held_out) == 1
    with pytest.raises(ValueError, match=r"of 9 training images a share of 0\.1 is 0.*TEST\.LOGREG\.VAL"):
        split_held_out(np.arange(9), 0.1, 0)


def test_features_that_are_not_finite_are_an_error() -> None:
    train = _rows(0, 60)
    train.features[7, 2] = float("nan")
    with pytest.raises(ValueError, match=r"features of 1 of 60 images are not finite, e\.g\. images number \[7\]"):
        _evaluate(train, _rows(1, 40))


def test_each_test_set_has_its_own_training_set(tiny_cfg: CfgNode) -> None:
    first, second = "synthetic:num_images=30:num_classes=3:size=8", "digits:split=test"
    tiny_cfg.merge_from_list(["DATASETS.TEST", (first, second), "TEST.LOGREG.DTYPE", "float32"])
    tiny_cfg.TEST.TRAIN_PER_TEST = (f"{first}:seed=1", second.replace("test", "train"))
    model = build_model(tiny_cfg).feature_model()  # type: ignore[operator]
    evaluators = [build_logreg_evaluator(tiny_cfg, name, build_test_loader) for name in (first, second)]
    assert isinstance(evaluators[0], LogregEvaluator)
    assert [len(e.class_names) for e in evaluators] == [3, 10]  # type: ignore[attr-defined]
    evaluators[0].prepare(model.eval())
    assert evaluators[0].protocol()["logreg"]["num_train_images"] == 30
    assert evaluators[0]._train is not None
    assert evaluators[0]._train.features.dtype == np.float32


def test_classes_of_a_validation_set_meet_by_name(tiny_cfg: CfgNode) -> None:
    tiny_cfg.TEST.LOGREG.TRAIN = ("synthetic:num_classes=3:size=8",)
    tiny_cfg.TEST.LOGREG.VAL = ("synthetic:num_classes=5:size=8:seed=1",)
    evaluator = build_logreg_evaluator(tiny_cfg, "synthetic:num_classes=4:size=8:seed=2", build_test_loader)
    assert isinstance(evaluator, LogregEvaluator)
    assert evaluator.val_labels == [0, 1, 2, 3, 4]
    assert len(evaluator.class_names) == 5
