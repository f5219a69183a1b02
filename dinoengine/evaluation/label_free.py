"""What features tell without labels: their rank, spectrum and spread, and how a teacher uses its prototypes.

Shapes: N images, D features (the CLS token after the final norm), K prototypes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import FeatureCollector, dataset_of
from dinoengine.evaluation.moments import Moments
from dinoengine.modeling.meta_arch import PrototypeHead
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_first_n

TASK = "label_free"
RANKME_EPSILON = 1e-7  # that of the paper for float32 features
_FEWEST_RANKS = 3  # a line through two points fits whatever they are


def rankme(singular_values: Tensor) -> float:
    """Effective rank of a feature matrix (RankMe, arXiv:2210.02885, Eq. 1-2): exp of the entropy of

        p_k = sigma_k / sum of all sigma + 1e-7

    Args:
        singular_values: [min(N, D)] of the feature matrix, not centred.

    Returns:
        From 1 (all features on one line) to min(N, D); 0 if all features are 0.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total + RANKME_EPSILON).sum().exp())


def power_law_exponent(eigenvalues: Tensor, ranks: Sequence[int]) -> float:
    """alpha of eigenvalue(rank) ~ rank ** -alpha (alpha-ReQ, arXiv:2202.05808).

    As in the code released with it: a line through log eigenvalue over log rank, least squares weighted by 1 / rank.
    That of a good representation is near 1; large: few directions carry all; near 0: noise.

    Args:
        eigenvalues: [D] of the covariance, any order.
        ranks: (first, last) that are fitted, the largest eigenvalue having rank 1. Those that rounding hides are left
            out.

    Returns:
        NaN if fewer than three of these ranks are left.
    """
    ordered = eigenvalues.double().sort(descending=True).values
    floor = ordered[0] * torch.finfo(torch.float64).eps * len(ordered)
    first, last = ranks[0], min(ranks[1], int((ordered > floor).sum()))
    if last - first + 1 < _FEWEST_RANKS:
        return math.nan
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=ordered.device)
    weight = (1 / rank) / (1 / rank).sum()
    x, y = rank.log(), ordered[first - 1 : last].log()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def feature_metrics(features: Moments, directions: Moments, alpha_ranks: Sequence[int]) -> dict[str, float]:
    """RankMe, alpha and spread.

    Singular values are square roots of eigenvalues of the Gram matrix [D, D] in float64: below 1e-8 of the largest they
    are rounding, which is a tenth of what RankMe's epsilon adds to each.

    Args:
        features: of the features as they are.
        directions: of the same features, each divided by its L2 norm; diagonal.
    """
    dim = len(features.mean)
    most = min(features.count, dim)
    singular_values = torch.linalg.eigvalsh(features.gram())[-most:].clamp(min=0).sqrt()
    rank = rankme(singular_values)
    std = float(directions.covariance().sqrt().mean())
    alpha = power_law_exponent(torch.linalg.eigvalsh(features.covariance()), alpha_ranks)
    if math.isnan(alpha):
        log_first_n(
            logging.WARNING,
            f"label_free: alpha is not a number (null in files): of the ranks {tuple(alpha_ranks)} "
            f"(TEST.LABEL_FREE.ALPHA_RANKS) fewer than {_FEWEST_RANKS} have an eigenvalue above 0; {features.count} images "
            f"have at most {features.count - 1} of them.",
            name=__name__,
        )
    return {
        "rankme": rank,
        "rankme_share": rank / most,
        "alpha": alpha,
        "feature_std": std,
        "feature_std_relative": std * math.sqrt(dim),
    }


class Assignments:
    """Which prototypes images get, in sums over images: [K] each, float64."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(3, 0, dtype=torch.float64, device=device)

    def add(self, probabilities: Tensor) -> None:
        """[B, K], each row sums to 1."""
        probabilities = probabilities.double()
        wins = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        sums = torch.stack((wins.double(), probabilities.sum(0), torch.special.entr(probabilities).sum(0)))
        self._sums = sums if not self._sums.numel() else self._sums + sums

    def metrics(self) -> dict[str, float]:
        """Of the images of all processes; a collective operation."""
        num_prototypes = max(comm.all_gather(self._sums.shape[1]))
        own = self._sums if self._sums.numel() else self._sums.new_zeros(3, num_prototypes)
        wins, mass, entropy = comm.all_reduce_sum(own)
        num_images = wins.sum()
        mean_entropy = float(entropy.sum() / num_images)
        return {
            "prototype_usage": float((wins > 0).double().mean()),
            "prototype_perplexity": float(torch.special.entr(mass / num_images).sum().exp()),
            "teacher_entropy": mean_entropy,
            # The only distribution over one prototype is uniform.
            "teacher_entropy_relative": mean_entropy / math.log(num_prototypes) if num_prototypes > 1 else 1.0,
        }


class LabelFreeEvaluator(DatasetEvaluator):
    """``{"label_free": {metric: value}}`` of the CLS tokens of a dataset; needs no label and no training set.

    Of the features (``feature_metrics``): "rankme" and as a share of min(N, D), "alpha", "feature_std" (of L2-normalised
    features, mean over dimensions) and in units of 1 / sqrt(D), which is 1 where they are spread over the whole sphere.

    Of the teacher's prototypes, where the model has them: "prototype_usage" (share that wins at least one image; at most
    N / K), "prototype_perplexity" (of the mean assignment, 1 to K), "teacher_entropy" (mean entropy of an image's
    assignment, in nats) and as a share of log K, "teacher_temp" (the temperature at which they were measured).
    """

    def __init__(self, alpha_ranks: Sequence[int] = (4, 50), test_set: ImageDataset | None = None) -> None:
        """
        Args:
            alpha_ranks: see ``power_law_exponent``.
            test_set: names its images in messages.
        """
        self.test_set = test_set
        self.alpha_ranks = tuple(alpha_ranks)
        self._head: PrototypeHead | None = None
        self._device = torch.device("cpu")
        self.reset()

    def prepare(self, model: nn.Module) -> None:
        self._head = getattr(model, "prototype_head", None)
        self._device = next(model.parameters()).device
        if self._head is None:
            log_first_n(
                logging.INFO,
                "The model has no teacher's head: label_free leaves out what is about prototypes.",
                name=__name__,
            )
        self.reset()

    def reset(self) -> None:
        self._features = Moments(self._device)
        self._directions = Moments(self._device, diagonal=True)
        self._assignments = Assignments(self._device)
        # One number per image, which tells whether each came once and is finite.
        self._norms = FeatureCollector(self.test_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        features = output.cls_token.double()
        self._features.add(features)
        self._directions.add(F.normalize(features, dim=1))
        self._norms.add(features.norm(dim=1, keepdim=True), None, batch.indices)
        if self._head is not None:
            self._assignments.add(self._head.probabilities(output.cls_token))

    def protocol(self) -> dict[str, Any]:
        return {TASK: {"features": "cls", "alpha_ranks": list(self.alpha_ranks)}}

    def evaluate(self) -> Results:
        self._norms.finish()
        features, directions = self._features.of_all_processes(), self._directions.of_all_processes()
        metrics = feature_metrics(features, directions, self.alpha_ranks)
        if self._head is not None:
            metrics |= {**self._assignments.metrics(), "teacher_temp": self._head.temp()}
        return {TASK: metrics}


@EVALUATOR_REGISTRY.register(TASK)
def build_label_free_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.LABEL_FREE; the dataset may be any, and there is no other to load."""
    return LabelFreeEvaluator(cfg.TEST.LABEL_FREE.ALPHA_RANKS, dataset_of(make_loader(cfg, dataset)))
