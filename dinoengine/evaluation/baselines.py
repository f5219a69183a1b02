"""What to compare a k-NN result with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.evaluation.features import Features, extract_pixels
from dinoengine.evaluation.knn import KNNSettings, knn_accuracy


def pixel_knn_accuracy(
    cfg: CfgNode, bank_loader: Any, query_loader: Any, bank_labels: Sequence[int] | None = None
) -> dict[str, float]:
    """k-NN on the evaluation crops themselves, minus the mean of the training set, settings of TEST.KNN.

    Args:
        bank_labels: what each label of the bank is called in the query set (``labels_by_name``); None if they agree.
    """
    bank, queries = extract_pixels(bank_loader), extract_pixels(query_loader)
    if bank_labels is not None:
        bank = bank.relabelled(bank_labels)
    mean = bank.features.mean(0, keepdim=True)
    return knn_accuracy(
        Features(bank.features - mean, bank.labels),
        Features(queries.features - mean, queries.labels),
        KNNSettings.from_config(cfg),
    )
