"""Checks of the keys under TEST, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dinoengine.config.config import CfgNode


def are_numbers(values: tuple[Any, ...], length: int | None = None) -> bool:
    """Whether these are finite numbers (``length`` of them)."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return numbers and length in (None, len(values))


def evaluation_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with the keys under TEST (their ranges are checked with all others)."""
    for name in cfg.TEST.BASELINES:
        if name not in ("pixels", "untrained"):
            yield f"TEST.BASELINES takes 'pixels' and 'untrained'; got {name!r}."
    if cfg.TEST.EVAL_PERIOD > 0 and not cfg.DATASETS.TEST:
        yield "TEST.EVAL_PERIOD > 0 needs a labelled dataset in DATASETS.TEST."
    if cfg.TEST.EVAL_AT_START and not cfg.DATASETS.TEST:
        yield "TEST.EVAL_AT_START needs a labelled dataset in DATASETS.TEST."
    if cfg.TEST.EXPECTED_RESULTS and not cfg.DATASETS.TEST:
        yield "TEST.EXPECTED_RESULTS needs a labelled dataset in DATASETS.TEST."
    for row in cfg.TEST.EXPECTED_RESULTS:
        is_row = isinstance(row, (tuple, list)) and len(row) in (4, 5)
        if not is_row or not are_numbers(tuple(row[-2:])):
            yield (
                "TEST.EXPECTED_RESULTS lists rows (task, metric, value, tolerance), with the dataset in front if there are "
                f"several, e.g. \"(('knn', 'top1_k20', 78.0, 2.0),)\"; got {row!r}."
            )
    if cfg.TEST.BEST_METRIC and not (cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD):
        yield f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r} needs DATASETS.TEST and TEST.EVAL_PERIOD > 0."
    if not cfg.TEST.KNN.K or not all(isinstance(k, int) and k > 0 for k in cfg.TEST.KNN.K):
        yield f"TEST.KNN.K must list positive whole numbers, got {cfg.TEST.KNN.K}."
    if not all(isinstance(n, int) and n > 0 for n in cfg.TEST.KNN.NUM_PER_CLASS):
        yield f"TEST.KNN.NUM_PER_CLASS must list positive whole numbers (or nothing), got {cfg.TEST.KNN.NUM_PER_CLASS}."
