"""Showing results, and holding them against what was expected."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

logger = logging.getLogger(__name__)

# top1_k20, val_top1, top5_k10_n5_std, mean_per_class, map, map_11_point, miou, pixel_accuracy
_PERCENT = re.compile(r"(val_)?top\d+(_.+)?|mean_per_class|map(_11_point)?|miou|pixel_accuracy")


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """``{"knn": {"top1_k20": 97.0}}`` -> ``{"knn/top1_k20": 97.0}``, at any depth."""
    flat: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": v for inner, v in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log results as lines that are easy to copy and to find: ``copypaste: Task: ...``, names, values.

    Results of several datasets have tasks called ``dataset/task``.
    """
    for task, metrics in results.items():
        if isinstance(metrics, Mapping) and any(isinstance(value, Mapping) for value in metrics.values()):
            print_csv_format({f"{task}/{inner}": value for inner, value in metrics.items()})
        elif isinstance(metrics, Mapping):
            logger.info("copypaste: Task: %s", task)
            logger.info("copypaste: %s", ",".join(metrics))
            logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in metrics.values()))
        else:
            logger.info("copypaste: %s=%s", task, metrics)


def verify_results(expected: Sequence[Sequence[Any]], results: Mapping[str, Any]) -> bool:
    """Check results against rows of TEST.EXPECTED_RESULTS and log a table.

    Args:
        expected: rows (task, metric, value, tolerance), or (dataset, task, metric, value, tolerance) when several
            datasets were evaluated.
        results: nested by task, or by dataset and task.

    Returns:
        True if every metric is there, finite and within its tolerance.

    Raises:
        ValueError: for a row of another form.
    """
    flat = flatten_results_dict(results)
    rows, all_good = [], True
    for row in expected:
        if len(row) not in (4, 5) or not all(isinstance(v, (int, float)) for v in row[-2:]):
            raise ValueError(
                f"A row of TEST.EXPECTED_RESULTS is (task, metric, value, tolerance), with the dataset in front if there "
                f"are several; got {row!r}."
            )
        *names, value, tolerance = row
        name = "/".join(str(n) for n in names)
        got = flat.get(name)
        good = isinstance(got, (int, float)) and math.isfinite(got) and abs(got - value) <= tolerance
        all_good &= good
        rows.append(
            (name, f"{value:g} +- {tolerance:g}", "missing" if got is None else got, "ok" if good else "FAILED")
        )
    table = tabulate(rows, headers=("metric", "expected", "got", "verdict"))
    logger.log(logging.INFO if all_good else logging.ERROR, "Expected results:\n%s", table)
    if not all_good:
        logger.error("Results are not as expected. There are: %s", ", ".join(f"{k}={v}" for k, v in flat.items()))
    return all_good


def unit_of(metric: str) -> str:
    """ "%" for accuracies and IoU, "nats" for entropies, by the metric's name; "" for what has none."""
    if _PERCENT.fullmatch(metric):
        return "%"
    return "nats" if metric == "teacher_entropy" else ""


def results_tables(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table for each evaluator: a row per metric with its unit, a column per feature that was evaluated by it.

    Args:
        rows: feature or model -> ``task/metric`` -> value.
    """
    tasks = dict.fromkeys(name.rpartition("/")[0] for metrics in rows.values() for name in metrics)
    return "\n\n".join(_task_table(rows, task) for task in tasks)


def _task_table(rows: Mapping[str, Mapping[str, float]], task: str) -> str:
    prefix = f"{task}/" if task else ""
    of_task = {
        feature: {name.removeprefix(prefix): v for name, v in metrics.items() if name.rpartition("/")[0] == task}
        for feature, metrics in rows.items()
    }
    columns = {feature: metrics for feature, metrics in of_task.items() if metrics}
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    body = [[name, unit_of(name), *(_shown(m.get(name), unit_of(name)) for m in columns.values())] for name in names]
    alignment = ("left", "left", *["right"] * len(columns))
    return tabulate(body, headers=[task, "unit", *columns], disable_numparse=True, colalign=alignment)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if unit == "%" else f"{value:.4g}"
