"""Segmentation by nearest neighbours among patches: no training at all, so minutes instead of hours.

After the dense nearest-neighbour retrieval of arXiv:2306.01667, with the weights of DINO's k-NN; a bank patch votes for the
class of most of its pixels.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.confusion import ConfusionMatrix, log_iou_per_class, segmentation_scores
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.evaluation.knn import knn_scores
from dinoengine.evaluation.mask_sets import MaskSets, match_mask_sets
from dinoengine.evaluation.neighbours import DEFAULT_MEMORY_MIB, NeighbourSearch
from dinoengine.evaluation.patch_bank import PatchBank, patch_classes
from dinoengine.structures import BackboneOutput, ImageBatch

logger = logging.getLogger(__name__)


class DenseKNNEvaluator(DatasetEvaluator):
    """``{"dense_knn": {"miou": percent, "pixel_accuracy": percent}}``; IoU per class goes to the log."""

    def __init__(
        self,
        sets: MaskSets,
        *,
        k: int = 30,
        temperature: float = 0.07,
        num_patches: int = 100_000,
        balanced: bool = False,
        seed: int = 0,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        """
        Args:
            k: number of neighbours; above the size of the bank the whole bank votes.
            temperature: see ``knn_scores``.
            num_patches, balanced, seed: of the bank, see ``PatchBank``.
            memory_mib: bounds the similarities held at a time, see ``NeighbourSearch``.
        """
        self.sets = sets
        self.k = k
        self.temperature = temperature
        self.num_patches = num_patches
        self.balanced = balanced
        self.seed = seed
        self.memory_mib = memory_mib
        self._bank_classes: Tensor | None = None
        self._search: NeighbourSearch | None = None
        self._confusion = ConfusionMatrix(sets.num_classes, sets.test_set)
        self._finite = FiniteCheck(sets.test_set)

    def prepare(self, model: nn.Module) -> None:
        """Sample the bank."""
        device = next(model.parameters()).device
        bank = PatchBank(
            self.num_patches,
            self.sets.num_classes,
            seed=self.seed,
            balanced=self.balanced,
            dataset=self.sets.train_set,
        )
        for batch in self.sets.train_loader:
            output = model(batch.images.to(device))
            masks = self.sets.relabelled(batch.masks.to(device))
            classes = patch_classes(masks, output.grid, self.sets.num_classes)
            bank.add(F.normalize(output.patch_tokens.float(), dim=2), classes, batch.indices)
        found = bank.finish()
        assert found.labels is not None
        self._bank_classes = found.labels.to(device)
        self._search = NeighbourSearch(found.features.to(device), min(self.k, len(found)), memory_mib=self.memory_mib)
        logger.info("Dense k-NN: a bank of %d patches of %d classes.", len(found), len(found.labels.unique()))

    def reset(self) -> None:
        self._confusion = ConfusionMatrix(self.sets.num_classes, self.sets.test_set)
        self._finite = FiniteCheck(self.sets.test_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        assert batch.masks is not None
        self._finite.see(output.patch_tokens, batch.indices)
        # Reported for all processes in evaluate(); a NaN has no neighbours, and an error here would be of one process.
        scores = self._scores(output.patch_tokens.nan_to_num(0.0, 0.0, 0.0).flatten(0, 1))  # [B * N, K]
        scores = scores.view(len(batch), *output.grid, -1).permute(0, 3, 1, 2)
        self._confusion.add(scores, batch.masks, batch.indices)

    def _scores(self, queries: Tensor) -> Tensor:
        assert self._search is not None, "prepare() comes before process()"
        assert self._bank_classes is not None
        scores = [
            knn_scores(
                found.similarity,
                self._bank_classes[found.indices],
                self.sets.num_classes,
                self._search.k,
                self.temperature,
            )
            for found in self._search.search(queries)
        ]
        return torch.cat(scores)

    def evaluate(self) -> Results:
        self._finite.finish()
        counts = self._confusion.finish()
        self._bank_classes = self._search = None  # features of the weights as they were; the next call has others
        log_iou_per_class(counts, self.sets.class_names, "Dense k-NN segmentation")
        return {"dense_knn": segmentation_scores(counts)}

    def protocol(self) -> dict[str, Any]:
        names = ("k", "temperature", "num_patches", "balanced", "seed")
        settings = {name: getattr(self, name) for name in names}
        return {"dense_knn": {**settings, "num_train_images": len(self.sets.train_set)}}


@EVALUATOR_REGISTRY.register("dense_knn")
def build_dense_knn_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.DENSE_KNN; the bank comes from TEST.DENSE_KNN.TRAIN, or DATASETS.TRAIN if that is empty.

    Raises:
        ValueError: if either dataset has no masks, or they share no class.
    """
    knn = cfg.TEST.DENSE_KNN
    return DenseKNNEvaluator(
        match_mask_sets(cfg, "dense_knn", knn.TRAIN, dataset, make_loader),
        k=knn.K,
        temperature=knn.TEMPERATURE,
        num_patches=knn.NUM_PATCHES,
        balanced=knn.BALANCED,
        seed=knn.SEED,
        memory_mib=knn.MEMORY_MIB,
    )
