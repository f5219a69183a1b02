"""Accuracy of a classifier's own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset, require_labels
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory, UnsuitableTestSetError
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import FeatureCollector
from dinoengine.evaluation.label_sets import labels_by_name, require_single_label
from dinoengine.structures import BackboneOutput, ClassifierOutput, ImageBatch

TOP = 5


def tops_of(num_classes: int) -> tuple[int, ...]:
    """The k of the top-k accuracies that are reported: 1, and 5 with more than five classes."""
    return (1, TOP) if num_classes > TOP else (1,)


def ranks_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one: 0 is top-1.

    Of equal logits the one with the smaller number comes first, so a head that cannot tell classes apart gets no credit
    for it.

    Args:
        logits: [B, K], computed in float32.
        labels: [B] int64; one that is no class of the head (below 0) has rank K.

    Returns:
        [B] float32; NaN where a logit is not finite.
    """
    logits = logits.float()
    right = logits.gather(1, labels.clamp(min=0)[:, None])  # [B, 1]
    numbers = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > right) | ((logits == right) & (numbers < labels[:, None]))  # [B, K]
    ranks = before.sum(1).float().masked_fill(labels < 0, logits.shape[1])
    return ranks.masked_fill(~torch.isfinite(logits).all(dim=1), float("nan"))


class ClassificationEvaluator(DatasetEvaluator):
    """``{"classification": {"top1": percent, "top5": percent}}``; top-5 with more than five classes."""

    def __init__(
        self, num_classes: int, classes: Sequence[int] | None = None, test_set: ImageDataset | None = None
    ) -> None:
        """
        Args:
            num_classes: of the head.
            classes: the number that each label of the test set has for the head, -1 for a class it does not know; None
                if they agree.
            test_set: names its images in messages.
        """
        self.num_classes = num_classes
        self.classes = classes
        self.test_set = test_set
        self._ranks = FeatureCollector(test_set)

    def reset(self) -> None:
        self._ranks = FeatureCollector(self.test_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        """
        Raises:
            ValueError: if the model is no classifier, or the batch has no labels.
        """
        if not isinstance(output, ClassifierOutput):
            raise ValueError(
                "The evaluator 'classification' needs a model with a head (MODEL.META_ARCHITECTURE ImageClassifier); for "
                "features alone use TEST.EVALUATORS knn."
            )
        if batch.labels is None:
            raise ValueError("The evaluator 'classification' needs labels, and the test set has none.")
        labels = batch.labels
        if self.classes is not None:
            labels = torch.tensor(self.classes, device=labels.device)[labels]
        self._ranks.add(ranks_of(output.logits, labels)[:, None], batch.labels, batch.indices)

    def protocol(self) -> dict[str, Any]:
        return {"classification": {"num_classes": self.num_classes}}

    def evaluate(self) -> Results:
        ranks = self._ranks.finish().features[:, 0]  # every image exactly once, of all processes
        tops = tops_of(self.num_classes)
        counts = {f"top{top}": int((ranks < top).sum()) for top in tops}
        return {"classification": {name: 100.0 * count / len(ranks) for name, count in counts.items()}}


@EVALUATOR_REGISTRY.register("classification")
def build_classification_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """Classes of the test set and of DATASETS.TRAIN, whose numbers the head was trained on, meet by name.

    Without DATASETS.TRAIN (an evaluation of weights that came without it) both must have the same order.

    Raises:
        UnsuitableTestSetError: if the test set has no labels, or is multi-label.
        ValueError: if it is no classifier, the number of classes is another than that of the head, or training and test
            set share no class.
    """
    num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    if not num_classes:
        raise ValueError(
            "TEST.EVALUATORS classification is for a classifier, and MODEL.CLASSIFIER.NUM_CLASSES is 0; use knn."
        )
    test_set = make_loader(cfg, dataset).dataset.dataset
    require_single_label(test_set, "classification", f"the test set {dataset!r}", UnsuitableTestSetError)
    test_names = test_set.class_names
    if test_names is None:
        raise UnsuitableTestSetError(
            f"The evaluator 'classification' needs labels, and the test set {dataset!r} has none."
        )
    if not cfg.DATASETS.TRAIN:
        if len(test_names) != num_classes:
            raise ValueError(
                f"MODEL.CLASSIFIER.NUM_CLASSES is {num_classes}, and the test set {dataset!r} has {len(test_names)} "
                "classes. Name the training set in DATASETS.TRAIN, so that classes can be matched by name."
            )
        return ClassificationEvaluator(num_classes, test_set=test_set)
    train_set = make_loader(cfg, cfg.DATASETS.TRAIN).dataset.dataset
    require_labels(train_set, num_classes, f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)}")
    class_of = {label: number for number, label in enumerate(labels_by_name(train_set.class_names, test_names))}
    classes = [class_of.get(label, -1) for label in range(len(test_names))]
    return ClassificationEvaluator(num_classes, classes, test_set)
