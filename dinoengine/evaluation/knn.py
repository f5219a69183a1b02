"""Weighted k-nearest-neighbour classification, the protocol of DINO (arXiv:2104.14294, section 4.1)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import FeatureCollector, Features, extract_features
from dinoengine.evaluation.label_sets import match_label_sets, no_labels
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_first_n

logger = logging.getLogger(__name__)


def knn_scores(
    bank: Tensor, bank_classes: Tensor, num_classes: int, queries: Tensor, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Votes of the k nearest rows for each class.

    similarity = q . b for L2-normalised rows; weights = softmax(similarity / temperature) over the max(ks) nearest;
    the score of a class for k is the sum of the weights of those among the k nearest that belong to it.

    Args:
        bank: [N, D] float32, L2-normalised, N >= max(ks).
        bank_classes: [N] int64 in 0..num_classes-1.
        queries: [Q, D] float32, L2-normalised.

    Returns:
        k -> [Q, num_classes] float32.
    """
    similarity, neighbours = (queries @ bank.T).topk(max(ks), dim=1)  # sorted, largest first
    weights = F.softmax(similarity / temperature, dim=1)  # [Q, max k]
    classes = bank_classes[neighbours]  # [Q, max k]
    scores = {}
    for k in ks:
        votes = torch.zeros(len(queries), num_classes, device=queries.device)
        scores[k] = votes.scatter_add_(1, classes[:, :k], weights[:, :k])
    return scores


def knn_accuracy(
    bank: Features, queries: Features, ks: Sequence[int], *, temperature: float = 0.07, chunk_size: int = 1024
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent: ``{"top1_k10": ..., "top5_k10": ...}`` (top-5 with more than five classes).

    A class without any vote is never a hit, so top-5 counts no luck. Every process must call it with the same features;
    they share the queries.

    Args:
        bank, queries: with labels; any integers.
        ks: numbers of neighbours; one above the size of the bank takes the whole bank, and that is said.
        chunk_size: queries compared at a time; memory is chunk_size * len(bank) floats.

    Raises:
        ValueError: if labels are missing.
    """
    if bank.labels is None or queries.labels is None:
        raise ValueError(no_labels("knn", "its training set" if bank.labels is None else "the test set"))
    used = {k: min(k, len(bank)) for k in ks}
    if any(k > len(bank) for k in ks):
        log_first_n(
            logging.WARNING,
            f"k-NN: the training set has {len(bank)} images; for larger k all of them vote.",
            name=__name__,
        )
    classes, bank_classes = torch.unique(bank.labels, return_inverse=True)
    num_top = min(5, len(classes))
    bank_rows = F.normalize(bank.features, dim=1)
    names = [f"top{top}_k{k}" for k in ks for top in ((1, 5) if len(classes) > 5 else (1,))]
    correct = torch.zeros(len(names), dtype=torch.int64)
    for start in range(comm.get_rank() * chunk_size, len(queries), comm.get_world_size() * chunk_size):
        rows = F.normalize(queries.features[start : start + chunk_size], dim=1)
        labels = queries.labels[start : start + chunk_size]
        scores = knn_scores(bank_rows, bank_classes, len(classes), rows, sorted(set(used.values())), temperature)
        hits: dict[str, Tensor] = {}
        for k in ks:
            top = scores[used[k]].topk(num_top, dim=1)
            is_hit = (classes[top.indices] == labels[:, None]) & (top.values > 0)  # [chunk, num_top]
            hits[f"top1_k{k}"] = is_hit[:, 0].sum()
            hits[f"top5_k{k}"] = is_hit.any(dim=1).sum()
        correct += torch.stack([hits[name] for name in names])
    correct = torch.stack(comm.all_gather(correct)).sum(0)
    return {name: 100.0 * count / len(queries) for name, count in zip(names, correct.tolist(), strict=True)}


class KNNEvaluator(DatasetEvaluator):
    """k-NN accuracy of the CLS features; ``{"knn": {...}}`` of ``knn_accuracy``."""

    def __init__(
        self,
        bank_loader: Any,
        *,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        chunk_size: int = 1024,
        bank_labels: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            bank_loader: ImageBatch of this rank's part of the labelled training set.
            bank_labels: what each label of the bank is called in the query set; None if they agree.
        """
        self.bank_loader = bank_loader
        self.bank_labels = bank_labels
        self.ks = ks
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._num_train_images = 0
        self._bank: Features | None = None
        self._queries = FeatureCollector()

    def prepare(self, model: nn.Module) -> None:
        self._bank = extract_features(model, self.bank_loader)
        if self.bank_labels is not None:
            self._bank = self._bank.relabelled(self.bank_labels)
        self._num_train_images = len(self._bank)

    def reset(self) -> None:
        self._queries = FeatureCollector()

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        self._queries.add(output.cls_token, batch.labels, batch.indices)

    def protocol(self) -> dict[str, Any]:
        return {
            "knn": {"k": list(self.ks), "temperature": self.temperature, "num_train_images": self._num_train_images}
        }

    def evaluate(self) -> Results:
        queries = self._queries.finish()
        assert self._bank is not None, "prepare() comes before evaluate()"
        accuracy = knn_accuracy(self._bank, queries, self.ks, temperature=self.temperature, chunk_size=self.chunk_size)
        self._bank = None  # features of the weights as they were; the next call has others
        return {"knn": accuracy}


@EVALUATOR_REGISTRY.register("knn")
def build_knn_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.KNN; the neighbours come from TEST.KNN.TRAIN, or DATASETS.TRAIN if that is empty.

    Raises:
        ValueError: if either dataset has no labels, or they share no class; better now than after the training.
    """
    knn = cfg.TEST.KNN
    sets = match_label_sets(cfg, "knn", knn.TRAIN, dataset, make_loader)
    return KNNEvaluator(
        sets.train_loader,
        ks=knn.K,
        temperature=knn.TEMPERATURE,
        chunk_size=knn.CHUNK_SIZE,
        bank_labels=sets.train_labels,
    )
