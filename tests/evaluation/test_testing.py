from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from dinoengine.config import get_cfg
from dinoengine.evaluation import flatten_results_dict, print_csv_format, results_tables, verify_results
from dinoengine.evaluation.testing import unit_of

RESULTS = {"knn": {"top1_k10": 96.5, "top1_k20": 97.25}, "probe": {"top-1": 80.0}}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    logger = logging.getLogger("dinoengine.evaluation.testing")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, logger.name)
    return caplog


# --- flatten_results_dict ----------------------------------------------------------------------------------------


def test_flatten_joins_names_at_any_depth() -> None:
    nested = {"digits:split=test": {"knn": {"top1": 1.0, "top5": 2.0}}, "folder:/a/b": {"knn": {"top1": 3.0}}, "n": 4}
    assert flatten_results_dict(nested) == {
        "digits:split=test/knn/top1": 1.0,
        "digits:split=test/knn/top5": 2.0,
        "folder:/a/b/knn/top1": 3.0,
        "n": 4,
    }
    assert flatten_results_dict({}) == {}
    assert flatten_results_dict({"empty": {}}) == {}


# --- print_csv_format --------------------------------------------------------------------------------------------


def test_copypaste_lines(log: pytest.LogCaptureFixture) -> None:
    print_csv_format({**RESULTS, "images": 360})
    assert log.messages == [
        "copypaste: Task: knn",
        "copypaste: top1_k10,top1_k20",
        "copypaste: 96.5000,97.2500",
        "copypaste: Task: probe",
        "copypaste: top-1",  # a dash in a name does not hide the metric
        "copypaste: 80.0000",
        "copypaste: images=360",
    ]


def test_copypaste_of_a_broken_metric_shows_it(log: pytest.LogCaptureFixture) -> None:
    print_csv_format({"knn": {"top1": math.nan}})
    assert log.messages[-1] == "copypaste: nan"


def test_copypaste_of_several_datasets_says_which(log: pytest.LogCaptureFixture) -> None:
    print_csv_format({"digits": {"knn": {"top1": 1.0}, "linear": {"top1": 2.0}}, "folder:/a/b": {"knn": {"top1": 3.0}}})
    assert log.messages[::3] == [
        "copypaste: Task: digits/knn",
        "copypaste: Task: digits/linear",
        "copypaste: Task: folder:/a/b/knn",
    ]
    assert log.messages[2::3] == ["copypaste: 1.0000", "copypaste: 2.0000", "copypaste: 3.0000"]


# --- verify_results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, good",
    [
        (("knn", "top1_k20", 97.0, 1.5), True),
        (["knn", "top1_k20", 97.25, 0], True),
        (("knn", "top1_k20", 97.0, 0.25), True),  # the tolerance is included
        (("knn", "top1_k20", 97.0, 0.2), False),
        (("knn", "top1_k20", 98.0, 0.5), False),  # too low
        (("knn", "top1_k20", 96.0, 0.5), False),  # better than expected is not as expected either
        (("probe", "top-1", 80, 1), True),
        (("knn", "top1_k99", 97.0, 100.0), False),  # no such metric
        (("linear", "top1_k20", 97.0, 100.0), False),  # no such task
        (("digits", "knn", "top1_k20", 97.0, 100.0), False),  # no such dataset level
    ],
)
def test_one_row(row: Any, good: bool) -> None:
    assert verify_results([row], RESULTS) is good


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "97.0"])
def test_what_is_no_finite_number_fails_whatever_the_tolerance(value: Any) -> None:
    assert verify_results([("knn", "top1", 97.0, math.inf)], {"knn": {"top1": value}}) is False


def test_several_datasets_are_told_apart() -> None:
    results = {"digits:split=test": {"knn": {"top1": 90.0}}, "folder:/x/y": {"knn": {"top1": 50.0}}}
    rows = [("digits:split=test", "knn", "top1", 90, 1), ("folder:/x/y", "knn", "top1", 50, 1)]
    assert verify_results(rows, results)
    assert not verify_results([*rows, ("folder:/x/y", "knn", "top1", 90, 1)], results)
    assert not verify_results([("knn", "top1", 90, 1)], results)  # of which dataset?


def test_one_bad_row_fails_all_and_the_table_shows_each(log: pytest.LogCaptureFixture) -> None:
    rows = [("knn", "top1_k10", 10.0, 1.0), ("missing", "metric", 1.0, 1.0), ("knn", "top1_k20", 97.0, 1.0)]
    assert not verify_results(rows, RESULTS)
    table, hint = (record for record in log.records)
    assert table.levelno == hint.levelno == logging.ERROR
    bad, missing, good = table.getMessage().splitlines()[-3:]
    assert good.split() == ["knn/top1_k20", "97", "+-", "1", "97.25", "ok"]
    assert bad.split() == ["knn/top1_k10", "10", "+-", "1", "96.5", "FAILED"]
    assert missing.split() == ["missing/metric", "1", "+-", "1", "missing", "FAILED"]
    assert "There are: knn/top1_k10=96.5, knn/top1_k20=97.25, probe/top-1=80.0" in hint.getMessage()


def test_good_results_are_information_not_an_error(log: pytest.LogCaptureFixture) -> None:
    assert verify_results([("knn", "top1_k20", 97.0, 1.0)], RESULTS)
    assert [record.levelno for record in log.records] == [logging.INFO]
    assert verify_results([], RESULTS)


@pytest.mark.parametrize(
    "row",
    [
        ("top1_k20", 97.0, 1.0),
        ("a", "b", "c", "top1", 97.0, 1.0),
        ("knn", "top1_k20", "97.0", 1.0),
        ("knn", "top1_k20", 97.0, None),
        "knn/",
    ],
)
def test_a_row_of_another_form_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match=r"TEST.EXPECTED_RESULTS is \(task, metric, value, tolerance\).*got"):
        verify_results([row], RESULTS)


def test_rows_survive_the_config() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.EXPECTED_RESULTS", "(('knn', 'top1_k20', 97, 1.5), ['knn', 'top1_k10', 96.5, 0])"])
    reread = get_cfg()
    reread.merge_from_list(["TEST.EXPECTED_RESULTS", cfg.TEST.EXPECTED_RESULTS])
    assert verify_results(reread.TEST.EXPECTED_RESULTS, RESULTS)


# --- results_tables ----------------------------------------------------------------------------------------------


def test_an_evaluator_has_a_table_with_a_row_per_metric_and_a_column_per_feature() -> None:
    rows = {
        "raw pixels": {"knn/top1_k10": 95.0, "knn/top1_k20": 94.123},
        "trained teacher": {"knn/top1_k20": 97.0, "knn/top1_k10": 98.5},
    }
    header, _, first, second = results_tables(rows).splitlines()
    assert header.split() == ["knn", "unit", "raw", "pixels", "trained", "teacher"]
    assert first.split() == ["top1_k10", "%", "95.00", "98.50"]
    assert second.split() == ["top1_k20", "%", "94.12", "97.00"]


def test_evaluators_have_tables_of_their_own_without_features_that_lack_them() -> None:
    rows = {
        "raw pixels": {"knn/top1_k10": 95.0},
        "teacher": {"knn/top1_k10": 98.5, "label_free/rankme": 30.8642, "label_free/teacher_entropy": 1.25},
    }
    knn, label_free = results_tables(rows).split("\n\n")
    assert "raw pixels" in knn
    assert "rankme" not in knn
    assert label_free.splitlines()[2].split() == ["rankme", "30.86"]
    assert "raw pixels" not in label_free
    assert label_free.splitlines()[-1].split() == ["teacher_entropy", "nats", "1.25"]


def test_tables_show_a_dash_for_what_was_not_measured() -> None:
    table = results_tables({"a": {"t/x": 1.0}, "b": {"t/x": 2.0, "t/y": 3.0}})
    assert table.splitlines()[3].split() == ["y", "-", "3"]


@pytest.mark.parametrize(
    "metric, unit",
    [
        ("top1", "%"),
        ("val_top1", "%"),
        ("top5_k10_n5_std", "%"),
        ("mean_per_class", "%"),
        ("map", "%"),
        ("map_11_point", "%"),
        ("miou", "%"),
        ("pixel_accuracy", "%"),
        ("teacher_entropy", "nats"),
        ("teacher_entropy_relative", ""),
        ("rankme", ""),
        ("topology", ""),
        ("mapping", ""),
    ],
)
def test_units(metric: str, unit: str) -> None:
    assert unit_of(metric) == unit


def test_tables_of_four_evaluators_with_baselines_are_at_most_100_columns_wide() -> None:
    metrics = [
        f"{task}/{name}"
        for task in ("knn", "linear", "logreg", "label_free")
        for name in ("top1_k200", "feature_std_relative")
    ]
    rows = {name: dict.fromkeys(metrics, 12.345) for name in ("raw pixels", "untrained backbone", "trained teacher")}
    assert max(map(len, results_tables(rows).splitlines())) <= 100
