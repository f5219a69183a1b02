"""Features of a whole dataset, one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.data import ImageDataset
from dinoengine.evaluation.finite import not_finite
from dinoengine.utils import comm


@dataclass
class Features:
    """Rows in the order of the dataset.

    Attributes:
        features: [N, D] float32 on the CPU.
        labels: [N] int64, or None if the dataset has none.
    """

    features: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return self.features.shape[0]

    def relabelled(self, names: Sequence[int]) -> Features:
        """The same rows with label i called ``names[i]``."""
        return Features(self.features, None if self.labels is None else torch.tensor(names)[self.labels])


class FeatureCollector:
    """Gathers rows batch by batch on each process; ``finish`` merges them on all."""

    def __init__(self, dataset: ImageDataset | None = None) -> None:
        """
        Args:
            dataset: that the rows are of, to name its images in messages.
        """
        self.dataset = dataset
        self._features: list[Tensor] = []
        self._labels: list[Tensor | None] = []
        self._indices: list[Tensor] = []

    def add(self, features: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """[B, D], [B] or None, [B]: one batch and where its rows belong in the dataset."""
        # A copy: on the CPU .float().cpu() would be a view that keeps all tokens of the batch alive.
        self._features.append(features.to("cpu", torch.float32, copy=True))
        self._labels.append(None if labels is None else labels.cpu())
        self._indices.append(indices.cpu())

    def finish(self) -> Features:
        """All rows of all processes in dataset order.

        Raises:
            ValueError: if a feature is not finite (names the images), or an image came twice or was left out.
        """
        mine = (self._features, self._labels, self._indices)
        parts = comm.all_gather(mine)
        features = torch.cat([f for part in parts for f in part[0]])
        indices = torch.cat([i for part in parts for i in part[2]])
        labels = [label for part in parts for label in part[1]]
        order = indices.argsort()
        if not torch.equal(indices[order], torch.arange(len(indices))):
            raise ValueError("The loader did not give every image of the dataset exactly once; see InferenceSampler.")
        features = features[order]
        bad = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
        if len(bad):
            raise ValueError(not_finite(bad.tolist(), len(features), self.dataset))
        has_labels = all(label is not None for label in labels)
        return Features(features, torch.cat([x for x in labels if x is not None])[order] if has_labels else None)


def dataset_of(data_loader: Any) -> ImageDataset | None:
    """The dataset behind a loader of ``build_test_loader``; None for other iterables of ImageBatch."""
    dataset = getattr(getattr(data_loader, "dataset", None), "dataset", None)
    return dataset if isinstance(dataset, ImageDataset) else None


def extract_features(model: nn.Module, data_loader: Any) -> Features:
    """CLS tokens (after the final norm) of every image of a dataset.

    Args:
        model: images -> BackboneOutput; used in the mode it is in.
        data_loader: ImageBatch of this rank's part.

    Returns:
        The same Features on every process.
    """
    device = next(model.parameters()).device
    collector = FeatureCollector(dataset_of(data_loader))
    with torch.inference_mode():
        for batch in data_loader:
            collector.add(model(batch.images.to(device)).cls_token, batch.labels, batch.indices)
    return collector.finish()


def extract_pixels(data_loader: Any) -> Features:
    """The evaluation crops themselves as features, [N, C*H*W], in units of 0..255: a baseline without any model."""
    collector = FeatureCollector(dataset_of(data_loader))
    for batch in data_loader:
        collector.add(batch.images.flatten(1), batch.labels, batch.indices)
    return collector.finish()
