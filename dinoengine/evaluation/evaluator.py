"""Streaming evaluation of a model on a dataset."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)

Results = dict[str, Any]


class DatasetEvaluator:
    """Sees every batch of a dataset with the model's output, then gives results.

    On several processes each sees its part of the dataset; ``evaluate`` is called on all of them and must use the
    same collectives on each.
    """

    def prepare(self, model: nn.Module) -> None:
        """Before the first batch, with the model in eval mode: e.g. extract the features of a training set."""

    def reset(self) -> None:
        """Forget the batches seen."""

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        """Take in one batch (on the model's device) and what the model returned for it."""

    def evaluate(self) -> Results | None:
        """Results as ``{task: {metric: value}}``; those of rank 0 count, the other ranks may return None."""
        return None

    def protocol(self) -> dict[str, Any]:
        """What two results must share to be comparable, as ``{task: {setting: value}}``, JSON-serialisable.

        Settings that change results only, not those of speed and memory.
        """
        return {}


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators over one pass."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]) -> None:
        self.evaluators = list(evaluators)

    def prepare(self, model: nn.Module) -> None:
        for evaluator in self.evaluators:
            evaluator.prepare(model)

    def reset(self) -> None:
        for evaluator in self.evaluators:
            evaluator.reset()

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        for evaluator in self.evaluators:
            evaluator.process(batch, output)

    def evaluate(self) -> Results:
        """The union of all results.

        Raises:
            ValueError: if two evaluators report the same task.
        """
        results: Results = {}
        for evaluator in self.evaluators:
            for task, metrics in (evaluator.evaluate() or {}).items():
                if task in results:
                    raise ValueError(f"Two evaluators report results under {task!r}; rename one.")
                results[task] = metrics
        return results

    def protocol(self) -> dict[str, Any]:
        return {task: settings for evaluator in self.evaluators for task, settings in evaluator.protocol().items()}


@contextlib.contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; every sub-module gets its own mode back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def inference_on_dataset(
    model: nn.Module, data_loader: Any, evaluator: DatasetEvaluator | Sequence[DatasetEvaluator]
) -> Results:
    """Run ``model`` over a loader of ImageBatch and give every batch to the evaluator.

    Args:
        model: images [B, C, H, W] -> BackboneOutput, e.g. a FeatureModel.
        data_loader: this rank's part of the dataset, with ``len``.

    Returns:
        The evaluator's results on rank 0, the same on every rank; an empty dict if it has none.
    """
    if not isinstance(evaluator, DatasetEvaluator):
        evaluator = DatasetEvaluators(evaluator)
    device = next(model.parameters()).device
    start = time.perf_counter()
    compute_seconds = 0.0
    num_images = 0
    evaluator.reset()
    with inference_context(model):
        evaluator.prepare(model)
        for i, batch in enumerate(data_loader):
            batch = batch.to(device)
            began = time.perf_counter()
            output = model(batch.images)
            compute_seconds += time.perf_counter() - began
            evaluator.process(batch, output)
            num_images += len(batch)
            remaining = (time.perf_counter() - start) / (i + 1) * (len(data_loader) - i - 1)
            if remaining > 5:
                eta = datetime.timedelta(seconds=int(remaining))
                log_every_n_seconds(logging.INFO, f"Evaluating ... about {eta} left", 10, name=__name__, key="progress")
    began = time.perf_counter()
    # What follows from results (a table, a best checkpoint, an exit code) must be decided alike on all ranks.
    results: Results = comm.broadcast_object(evaluator.evaluate() or {})
    logger.info(
        "Evaluated %d images on %d process(es) in %.1f s (forward %.1f s, metrics %.1f s).",
        sum(comm.all_gather(num_images)),
        comm.get_world_size(),
        time.perf_counter() - start,
        compute_seconds,
        time.perf_counter() - began,
    )
    return results
