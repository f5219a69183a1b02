"""Evaluators by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.evaluation.evaluator import DatasetEvaluators
from dinoengine.utils.registry import Registry

LoaderFactory = Callable[[CfgNode, Any], Any]

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """Name -> a function ``(cfg, dataset, make_loader) -> DatasetEvaluator``.

``dataset`` is the string of the dataset to be evaluated; ``make_loader(cfg, dataset strings)`` gives a loader of
ImageBatch for whatever other data the evaluator needs.
"""


def build_evaluator(cfg: CfgNode, dataset: str) -> DatasetEvaluators:
    """All evaluators of TEST.EVALUATORS for one dataset string."""
    return DatasetEvaluators(
        [EVALUATOR_REGISTRY.get(name)(cfg, dataset, build_test_loader) for name in cfg.TEST.EVALUATORS]
    )
