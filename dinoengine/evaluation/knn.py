"""Weighted k-nearest-neighbour classification, the protocol of DINO (arXiv:2104.14294, section 4.1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.classification import ranks_of, tops_of
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import (
    IMAGE_FEATURES,
    FeatureCollector,
    Features,
    dataset_of,
    extract_features,
    image_feature,
)
from dinoengine.evaluation.label_sets import match_label_sets, no_labels
from dinoengine.evaluation.neighbours import DEFAULT_MEMORY_MIB, NeighbourSearch
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_first_n

SIMILARITY_DTYPES = ("float32", "float16", "bfloat16")


def knn_scores(similarity: Tensor, classes: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes of the k nearest neighbours for each class.

    weights = softmax(similarity / temperature) over all neighbours given (the largest k of the evaluation); the score of a
    class is the sum of the weights of those among the first k that belong to it.

    Args:
        similarity: [q, K] float32, largest first, K >= k.
        classes: [q, K] int64 in 0..num_classes-1.

    Returns:
        [q, num_classes] float32.
    """
    weights = F.softmax(similarity / temperature, dim=1)
    votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
    return votes.scatter_add_(1, classes[:, :k], weights[:, :k])


@dataclass(frozen=True)
class KNNSettings:
    """The settings of ``knn_accuracy``; by default the published ones.

    Attributes:
        ks: numbers of neighbours; one above the size of the bank takes the whole bank, and that is said.
        temperature: similarities are divided by it before the softmax.
        num_per_class: few-shot: images of each class in a bank; empty: none.
        num_tries: random banks for each of these numbers; the number of the try is the seed.
        memory_mib: bounds the similarities held at a time, over both bank and queries; does not change results on the CPU.
        similarity_dtype: "float32", "float16" or "bfloat16"; similarities of a half type have many ties.
        feature: what images are compared by, a name of ``image_feature``.

    Raises:
        ValueError: if one is out of its range; says which.
    """

    ks: Sequence[int] = (10, 20, 100, 200)
    temperature: float = 0.07
    num_per_class: Sequence[int] = ()
    num_tries: int = 1
    memory_mib: int = DEFAULT_MEMORY_MIB
    similarity_dtype: str = "float32"
    feature: str = "cls"

    def __post_init__(self) -> None:
        if not self.ks:
            raise ValueError("k-NN: ks is empty; give at least one number of neighbours.")
        counts = {"ks": self.ks, "num_per_class": self.num_per_class}
        counts |= {"num_tries": [self.num_tries], "memory_mib": [self.memory_mib]}
        for name, values in counts.items():
            if not all(value >= 1 for value in values):
                raise ValueError(f"k-NN: {name} must be 1 or more, got {getattr(self, name)}.")
        if not self.temperature > 0:
            raise ValueError(f"k-NN: temperature must be above 0, got {self.temperature}.")
        if self.similarity_dtype not in SIMILARITY_DTYPES:
            raise ValueError(
                f"k-NN: similarity_dtype must be one of {', '.join(SIMILARITY_DTYPES)}, got {self.similarity_dtype!r}."
            )
        if self.feature not in IMAGE_FEATURES:
            raise ValueError(f"k-NN: feature must be one of {', '.join(IMAGE_FEATURES)}, got {self.feature!r}.")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> KNNSettings:
        """TEST.KNN."""
        knn = cfg.TEST.KNN
        return cls(
            ks=knn.K,
            temperature=knn.TEMPERATURE,
            num_per_class=knn.NUM_PER_CLASS,
            num_tries=knn.NUM_TRIES,
            memory_mib=knn.MEMORY_MIB,
            similarity_dtype=knn.SIMILARITY_DTYPE,
            feature=knn.FEATURE,
        )

    def protocol(self) -> dict[str, Any]:
        """For ``DatasetEvaluator.protocol``: what results depend on."""
        few_shot = (
            {"num_per_class": list(self.num_per_class), "num_tries": self.num_tries} if self.num_per_class else {}
        )
        feature = {} if self.feature == "cls" else {"feature": self.feature}  # results of before have no such entry
        return {
            **feature,
            "k": list(self.ks),
            "temperature": self.temperature,
            **few_shot,
            "similarity_dtype": self.similarity_dtype,
        }


def knn_accuracy(
    bank: Features, queries: Features, settings: KNNSettings, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent: ``{"top1_k10": ..., "top5_k10": ...}`` (top-5 with more than five classes).

    Neighbours that are equally near come in the order of the bank, classes with equal votes in that of their labels. A
    class without any vote is never a hit, so top-5 counts no luck. Every process must call it with the same features; they
    share the queries, and the result is that of one process.

    Few-shot: for each n of ``num_per_class`` the bank is cut to n random images of each class, once for each try.
    ``top1_k5_n10`` is the mean over the tries, ``top1_k5_n10_std`` their standard deviation. Used are the k up to n, and n.

    Args:
        bank, queries: with labels; any integers.
        device: where the search runs; a copy of the bank must fit.

    Raises:
        ValueError: if labels are missing.
    """
    if bank.labels is None or queries.labels is None:
        raise ValueError(no_labels("knn", "its training set" if bank.labels is None else "the test set"))
    results = _accuracy(bank, queries, settings, device)
    for n in settings.num_per_class:
        few_shot = replace(settings, ks=[*(k for k in settings.ks if k < n), n])
        tries = [
            _accuracy(Features(bank.features[rows], bank.labels[rows]), queries, few_shot, device)
            for rows in few_shot_rows(bank.labels, n, settings.num_tries)
        ]
        for name in tries[0]:
            values = torch.tensor([result[name] for result in tries], dtype=torch.float64)
            results[f"{name}_n{n}"] = values.mean().item()
            if settings.num_tries > 1:
                results[f"{name}_n{n}_std"] = values.std(correction=0).item()
    return results


def few_shot_rows(labels: Tensor, num_per_class: int, num_tries: int) -> Iterator[Tensor]:
    """For each try the rows of ``num_per_class`` random images of each class, or all where there are fewer.

    Classes in the order of their labels; one generator, seeded with the number of the try.
    """
    rows_of = [(labels == label).nonzero().flatten() for label in torch.unique(labels)]
    sizes = [len(rows) for rows in rows_of]
    if small := [size for size in sizes if size < num_per_class]:
        used = sum(min(size, num_per_class) for size in sizes)
        log_first_n(
            logging.WARNING,
            f"k-NN: {len(small)} of {len(sizes)} classes have fewer than {num_per_class} training images ({min(small)} to "
            f"{max(small)}), and all of those are taken: results called _n{num_per_class} are of {used} training images, "
            f"not {num_per_class * len(sizes)}.",
            name=__name__,
        )
    for seed in range(num_tries):
        generator = torch.Generator().manual_seed(seed)
        yield torch.cat([rows[torch.randperm(len(rows), generator=generator)[:num_per_class]] for rows in rows_of])


def _accuracy(bank: Features, queries: Features, settings: KNNSettings, device: torch.device | str) -> dict[str, float]:
    """``knn_accuracy`` of this bank alone."""
    assert bank.labels is not None
    assert queries.labels is not None
    ks = settings.ks
    used = {k: min(k, len(bank)) for k in ks}
    if any(k > len(bank) for k in ks):
        log_first_n(
            logging.WARNING,
            f"k-NN: the training set has {len(bank)} images; for larger k all of them vote.",
            name=__name__,
        )
    classes, bank_classes = torch.unique(bank.labels, return_inverse=True)
    known = torch.searchsorted(classes, queries.labels).clamp(max=len(classes) - 1)
    right = torch.where(classes[known] == queries.labels, known, -1).to(device)  # -1: a class the bank lacks
    bank_classes = bank_classes.to(device)
    tops = tops_of(len(classes))
    start, stop = (len(queries) * rank // comm.get_world_size() for rank in (comm.get_rank(), comm.get_rank() + 1))
    search = NeighbourSearch(
        bank.features.to(device),
        max(used.values()),
        memory_mib=settings.memory_mib,
        dtype=getattr(torch, settings.similarity_dtype),
    )
    num_votes = max(1, settings.memory_mib * 2**20 // (16 * len(classes)))  # queries whose votes are counted at a time
    correct = {f"top{top}_k{k}": 0 for k in ks for top in tops}
    for found in search.search(queries.features[start:stop]):
        for part in torch.arange(len(found.indices), device=device).split(num_votes):
            labels = right[start + found.start + part]
            neighbour_classes = bank_classes[found.indices[part]]
            for k in dict.fromkeys(ks):
                scores = knn_scores(
                    found.similarity[part], neighbour_classes, len(classes), used[k], settings.temperature
                )
                has_vote = scores.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) > 0
                ranks = ranks_of(scores, labels)
                for top in tops:
                    correct[f"top{top}_k{k}"] += int((has_vote & (ranks < top)).sum())
    counts = torch.tensor(list(correct.values()))
    total = torch.stack(comm.all_gather(counts)).sum(0)
    return {name: 100.0 * count / len(queries) for name, count in zip(correct, total.tolist(), strict=True)}


class KNNEvaluator(DatasetEvaluator):
    """k-NN accuracy of the CLS tokens, or another ``KNNSettings.feature``, on the model's device.

    ``{"knn": {...}}`` of ``knn_accuracy``.
    """

    def __init__(
        self,
        bank_loader: Any,
        settings: KNNSettings | None = None,
        *,
        bank_labels: Sequence[int] | None = None,
        query_set: ImageDataset | None = None,
        **changes: Any,
    ) -> None:
        """
        Args:
            bank_loader: ImageBatch of this rank's part of the labelled training set.
            settings: None: the published ones.
            bank_labels: what each label of the bank is called in the query set; None if they agree.
            query_set: names its images in messages.
            changes: fields of KNNSettings that differ from ``settings``, e.g. ``ks=(20,)``.
        """
        self.bank_loader = bank_loader
        self.settings = replace(settings or KNNSettings(), **changes)
        self.bank_labels = bank_labels
        self.query_set = query_set
        self._num_train_images = 0
        self._bank: Features | None = None
        self._device = torch.device("cpu")
        self._queries = FeatureCollector(query_set)

    def prepare(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._bank = extract_features(model, self.bank_loader, self.settings.feature)
        if self.bank_labels is not None:
            self._bank = self._bank.relabelled(self.bank_labels)
        self._num_train_images = len(self._bank)

    def reset(self) -> None:
        self._queries = FeatureCollector(self.query_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        rows = image_feature(output, self.settings.feature)
        self._queries.add(rows, batch.labels, batch.indices)

    def protocol(self) -> dict[str, Any]:
        return {"knn": {**self.settings.protocol(), "num_train_images": self._num_train_images}}

    def evaluate(self) -> Results:
        queries = self._queries.finish()
        assert self._bank is not None, "prepare() comes before evaluate()"
        accuracy = knn_accuracy(self._bank, queries, self.settings, device=self._device)
        self._bank = None  # features of the weights as they were; the next call has others
        return {"knn": accuracy}


@EVALUATOR_REGISTRY.register("knn")
def build_knn_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.KNN; the neighbours come from TEST.KNN.TRAIN, or DATASETS.TRAIN if that is empty.

    Raises:
        ValueError: if either dataset has no labels, or they share no class; better now than after the training.
    """
    sets = match_label_sets(cfg, "knn", cfg.TEST.KNN.TRAIN, dataset, make_loader)
    return KNNEvaluator(
        sets.train_loader,
        KNNSettings.from_config(cfg),
        bank_labels=sets.train_labels,
        query_set=dataset_of(make_loader(cfg, dataset)),
    )
