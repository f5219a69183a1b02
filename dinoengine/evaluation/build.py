"""Evaluators by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dinoengine.config import CfgNode, ConfigError
from dinoengine.data import build_test_loader
from dinoengine.evaluation.evaluator import DatasetEvaluators
from dinoengine.utils.logger import log_first_n
from dinoengine.utils.registry import Registry, UnknownNameError

LoaderFactory = Callable[[CfgNode, Any], Any]

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """Name -> a function ``(cfg, dataset, make_loader) -> DatasetEvaluator``.

``dataset`` is the string of the dataset to be evaluated; ``make_loader(cfg, dataset strings)`` gives a loader of
ImageBatch for whatever other data the evaluator needs. The function raises UnsuitableTestSetError for a dataset that
lacks what its answers are compared with.
"""


class UnsuitableTestSetError(ValueError):
    """A test set without the kind of labels or the masks of an evaluator, which another test set of the run may have."""


def check_evaluator_names(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: names every entry of TEST.EVALUATORS that is not registered.
    """
    problems = []
    for name in cfg.TEST.EVALUATORS:
        try:
            EVALUATOR_REGISTRY.get(name)
        except UnknownNameError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("TEST.EVALUATORS", problems)


def build_evaluator(cfg: CfgNode, dataset: str) -> DatasetEvaluators:
    """The evaluators of TEST.EVALUATORS for one dataset string.

    One that cannot use this dataset is left out, with a line in the log, where the run has another evaluator for this
    dataset and another dataset for this evaluator: labelled folders, multi-label sets and masks may be evaluated in one
    run.

    Raises:
        UnsuitableTestSetError: if that is not so.
        ValueError, KeyError, FileNotFoundError: from the evaluators.
    """
    built: list[Any] = []
    unsuitable: dict[str, UnsuitableTestSetError] = {}
    for name in cfg.TEST.EVALUATORS:
        try:
            built.append(EVALUATOR_REGISTRY.get(name)(cfg, dataset, build_test_loader))
        except UnsuitableTestSetError as error:
            unsuitable[name] = error
    for name, reason in unsuitable.items():
        if not built or not _suits_another(cfg, name, dataset):
            raise reason
        log_first_n(logging.INFO, f"The evaluator {name!r} leaves out {dataset!r}: {reason}", name=__name__)
    return DatasetEvaluators(built)


def _suits_another(cfg: CfgNode, name: str, dataset: str) -> bool:
    """Whether an evaluator can use any other test set of the run."""
    for other in cfg.DATASETS.TEST:
        if other != dataset:
            try:
                EVALUATOR_REGISTRY.get(name)(cfg, other, build_test_loader)
            except UnsuitableTestSetError:
                continue
            return True
    return False
