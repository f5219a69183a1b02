"""Showing results, and holding them against what was expected."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

logger = logging.getLogger(__name__)


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
    """Log results as lines that are easy to copy and to find: ``copypaste: Task: ...``, names, values."""
    for task, metrics in results.items():
        if isinstance(metrics, Mapping):
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


def results_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of features (rows) and metrics (columns), in percent."""
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    body = [[feature, *(metrics.get(name) for name in columns)] for feature, metrics in rows.items()]
    return tabulate(body, headers=["feature", *columns], floatfmt=".2f", missingval="-")
