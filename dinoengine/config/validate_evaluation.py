"""Checks of the keys under TEST, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dinoengine.config.config import CfgNode

# The tables of ``validate`` for these keys: smallest value, largest value, whether the ends are allowed;
RANGES: dict[str, tuple[float, float, bool]] = {
    "TEST.LINEAR.HFLIP_PROB": (0, 1, True),
    "TEST.LOGREG.HELD_OUT": (0, 1, False),
    "TEST.SEGMENTATION.HFLIP_PROB": (0, 1, True),
    "TEST.EVAL_PERIOD": (0, float("inf"), True),
    "TEST.EARLY_STOPPING_PATIENCE": (0, float("inf"), True),
    "TEST.IMS_PER_BATCH": (1, float("inf"), True),
    "TEST.KNN.TEMPERATURE": (0, float("inf"), False),
    "TEST.KNN.NUM_TRIES": (1, float("inf"), True),
    "TEST.KNN.MEMORY_MIB": (1, float("inf"), True),
    "TEST.LINEAR.EPOCHS": (0, float("inf"), True),
    "TEST.LINEAR.ITERS": (0, float("inf"), True),
    "TEST.LINEAR.IMS_PER_BATCH": (1, float("inf"), True),
    "TEST.LINEAR.SEED": (0, float("inf"), True),
    "TEST.LINEAR.VAL_PERIOD": (0, float("inf"), True),
    "TEST.LINEAR.CHECKPOINT_PERIOD": (0, float("inf"), True),
    "TEST.LOGREG.SEED": (0, float("inf"), True),
    "TEST.LOGREG.NUM_C": (1, float("inf"), True),
    "TEST.LOGREG.MAX_LBFGS_ITERS": (1, float("inf"), True),
    "TEST.LOGREG.TOL": (0, float("inf"), False),
    "TEST.SEGMENTATION.ITERS": (1, float("inf"), True),
    "TEST.SEGMENTATION.IMS_PER_BATCH": (1, float("inf"), True),
    "TEST.SEGMENTATION.BASE_LR": (0, float("inf"), False),
    "TEST.SEGMENTATION.WARMUP_ITERS": (0, float("inf"), True),
    "TEST.SEGMENTATION.WEIGHT_DECAY": (0, float("inf"), True),
    "TEST.SEGMENTATION.SEED": (0, float("inf"), True),
    "TEST.DENSE_KNN.K": (1, float("inf"), True),
    "TEST.DENSE_KNN.TEMPERATURE": (0, float("inf"), False),
    "TEST.DENSE_KNN.NUM_PATCHES": (1, float("inf"), True),
    "TEST.DENSE_KNN.SEED": (0, float("inf"), True),
    "TEST.DENSE_KNN.MEMORY_MIB": (1, float("inf"), True),
    "TEST.PRECISE_BN.NUM_ITER": (1, float("inf"), True),
}
# allowed values;
CHOICES: dict[str, tuple[str, ...]] = {
    "TEST.SEGMENTATION.NUM_LAST_BLOCKS": ("1", "4"),
    "TEST.KNN.FEATURE": ("cls", "mean_patch", "patch"),
    "TEST.KNN.SIMILARITY_DTYPE": ("float32", "float16", "bfloat16"),
    "TEST.LOGREG.DTYPE": ("float64", "float32"),
    "TEST.BEST_METRIC_MODE": ("max", "min"),
}
# lists of names.
NAME_LISTS = (
    "TEST.EVALUATORS",
    "TEST.TRAIN_PER_TEST",
    "TEST.KNN.TRAIN",
    "TEST.LINEAR.TRAIN",
    "TEST.LINEAR.VAL",
    "TEST.LOGREG.TRAIN",
    "TEST.LOGREG.VAL",
    "TEST.SEGMENTATION.TRAIN",
    "TEST.DENSE_KNN.TRAIN",
)


def are_numbers(values: tuple[Any, ...], length: int | None = None) -> bool:
    """Whether these are finite numbers (``length`` of them)."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return numbers and length in (None, len(values))


def _expected_results_problems(cfg: CfgNode) -> Iterator[str]:
    """Rows that no result could be found for are noticed before a training, not after it."""
    datasets = cfg.DATASETS.TEST
    for row in cfg.TEST.EXPECTED_RESULTS:
        is_row = isinstance(row, (tuple, list)) and len(row) in (4, 5)
        if not is_row or not are_numbers(tuple(row[-2:])):
            yield (
                "TEST.EXPECTED_RESULTS lists rows (task, metric, value, tolerance), with the dataset in front if there are "
                f"several, e.g. \"(('knn', 'top1_k20', 78.0, 2.0),)\"; got {row!r}."
            )
        elif row[-1] < 0:
            yield f"TEST.EXPECTED_RESULTS: the tolerance, the last number of a row, is 0 or more; got {row!r}."
        elif len(row) == 5 and len(datasets) == 1:
            yield f"TEST.EXPECTED_RESULTS: there is one dataset in DATASETS.TEST, so leave {row[0]!r} out of {row!r}."
        elif len(datasets) > 1 and (len(row) == 4 or row[0] not in datasets):
            yield (
                f"TEST.EXPECTED_RESULTS: with several datasets each row begins with one of DATASETS.TEST, as it is written "
                f"there ({', '.join(datasets)}); got {row!r}."
            )


def problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with the keys under TEST (their ranges are checked with all others)."""
    for name in cfg.TEST.BASELINES:
        if name not in ("pixels", "untrained"):
            yield f"TEST.BASELINES takes 'pixels' and 'untrained'; got {name!r}."
    if len(set(cfg.TEST.EVALUATORS)) < len(cfg.TEST.EVALUATORS):
        yield f"TEST.EVALUATORS {cfg.TEST.EVALUATORS} names an evaluator twice; name each once."
    if cfg.TEST.EVAL_PERIOD > 0 and not cfg.DATASETS.TEST:
        yield "TEST.EVAL_PERIOD > 0 needs a dataset in DATASETS.TEST; without one set TEST.EVAL_PERIOD 0."
    if cfg.TEST.EVAL_AT_START and not cfg.DATASETS.TEST:
        yield "TEST.EVAL_AT_START needs a dataset in DATASETS.TEST."
    if cfg.TEST.EXPECTED_RESULTS and not cfg.DATASETS.TEST:
        yield "TEST.EXPECTED_RESULTS needs a dataset in DATASETS.TEST."
    yield from _expected_results_problems(cfg)
    if cfg.TEST.BEST_METRIC and not (cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD):
        yield f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r} needs DATASETS.TEST and TEST.EVAL_PERIOD > 0."
    if cfg.TEST.EARLY_STOPPING_PATIENCE and not cfg.TEST.BEST_METRIC:
        yield "TEST.EARLY_STOPPING_PATIENCE needs the metric that is to get better in TEST.BEST_METRIC."
    ranks = cfg.TEST.LABEL_FREE.ALPHA_RANKS
    if not (are_numbers(ranks, 2) and all(isinstance(r, int) for r in ranks) and 1 <= ranks[0] <= ranks[1] - 2):
        yield f"TEST.LABEL_FREE.ALPHA_RANKS must be (first, last), whole numbers from 1, at least three ranks; got {ranks}."
    if not cfg.TEST.KNN.K or not all(isinstance(k, int) and k > 0 for k in cfg.TEST.KNN.K):
        yield f"TEST.KNN.K must list positive whole numbers, got {cfg.TEST.KNN.K}."
    if not all(isinstance(n, int) and n > 0 for n in cfg.TEST.KNN.NUM_PER_CLASS):
        yield f"TEST.KNN.NUM_PER_CLASS must list positive whole numbers (or nothing), got {cfg.TEST.KNN.NUM_PER_CLASS}."
    yield from _training_set_problems(cfg)
    yield from _linear_problems(cfg)
    yield from _segmentation_problems(cfg)
    low_high = cfg.TEST.LOGREG.C_LOG10_RANGE
    if not (are_numbers(low_high, 2) and -300 < low_high[0] <= low_high[1] < 300):
        yield f"TEST.LOGREG.C_LOG10_RANGE must be (low, high), powers of 10, with low <= high, got {low_high}."


def _training_set_problems(cfg: CfgNode) -> Iterator[str]:
    per_test, tests = cfg.TEST.TRAIN_PER_TEST, cfg.DATASETS.TEST
    if not per_test:
        return
    if len(per_test) != len(tests) or len(set(tests)) != len(tests):
        yield (
            "TEST.TRAIN_PER_TEST names one training set for each dataset of DATASETS.TEST, in the same order, none of them "
            f"twice; there are {len(per_test)} and {len(tests)} ({len(set(tests))} different)."
        )
    for key, value in (
        ("TEST.KNN.TRAIN", cfg.TEST.KNN.TRAIN),
        ("TEST.LINEAR.TRAIN", cfg.TEST.LINEAR.TRAIN),
        ("TEST.LINEAR.VAL", cfg.TEST.LINEAR.VAL),
        ("TEST.LOGREG.TRAIN", cfg.TEST.LOGREG.TRAIN),
        ("TEST.LOGREG.VAL", cfg.TEST.LOGREG.VAL),
        ("TEST.SEGMENTATION.TRAIN", cfg.TEST.SEGMENTATION.TRAIN),
        ("TEST.DENSE_KNN.TRAIN", cfg.TEST.DENSE_KNN.TRAIN),
    ):
        if value:
            yield f"{key} {value} is for all test sets, and TEST.TRAIN_PER_TEST gives each its own; empty one of the two."


def _linear_problems(cfg: CfgNode) -> Iterator[str]:
    linear = cfg.TEST.LINEAR
    if (linear.EPOCHS > 0) == (linear.ITERS > 0):
        yield (
            f"TEST.LINEAR: one of EPOCHS and ITERS says how long to train and the other is 0; got {linear.EPOCHS:g} and "
            f"{linear.ITERS}."
        )
    lrs, blocks, mean_patch = linear.BASE_LRS, linear.NUM_LAST_BLOCKS, linear.MEAN_PATCH
    if not lrs or not are_numbers(lrs) or min(lrs) <= 0 or len(set(lrs)) < len(lrs):
        yield f"TEST.LINEAR.BASE_LRS must list numbers > 0, each once, got {lrs}."
    if not blocks or not all(type(n) is int and n > 0 for n in blocks) or len(set(blocks)) < len(blocks):
        yield f"TEST.LINEAR.NUM_LAST_BLOCKS must list positive whole numbers, each once, got {blocks}."
    if not mean_patch or not all(type(b) is bool for b in mean_patch) or len(set(mean_patch)) < len(mean_patch):
        yield f"TEST.LINEAR.MEAN_PATCH must list True, False or both, got {mean_patch}."
    if not (are_numbers(linear.CROP_SCALE, 2) and 0 <= linear.CROP_SCALE[0] <= linear.CROP_SCALE[1] <= 1):
        yield f"TEST.LINEAR.CROP_SCALE must be (low, high) with 0 <= low <= high <= 1, got {linear.CROP_SCALE}."


def _segmentation_problems(cfg: CfgNode) -> Iterator[str]:
    probe = cfg.TEST.SEGMENTATION
    ratio = probe.RESIZE_RATIO
    if not (are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1]):
        yield f"TEST.SEGMENTATION.RESIZE_RATIO must be (low, high) with 0 < low <= high, got {ratio}."
    if "segmentation" in cfg.TEST.EVALUATORS and probe.WARMUP_ITERS >= probe.ITERS:
        yield (
            f"TEST.SEGMENTATION.WARMUP_ITERS {probe.WARMUP_ITERS} must be below TEST.SEGMENTATION.ITERS {probe.ITERS}; "
            "else the probe's LR never reaches BASE_LR."
        )
