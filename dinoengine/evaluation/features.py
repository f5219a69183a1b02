"""Features of a whole dataset, one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.data import ImageDataset
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.structures import BackboneOutput
from dinoengine.utils import comm

IMAGE_FEATURES = ("cls", "mean_patch", "patch")
_EXCHANGED_BYTES = 2**20


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
        self._finite = FiniteCheck(dataset)
        self._parts: list[tuple[Tensor, Tensor]] = []  # features [B, D] and indices [B]
        self._labels: list[Tensor | None] = []

    def add(self, features: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """[B, D], [B] or None, [B]: one batch and where its rows belong in the dataset."""
        # A copy: on the CPU .float().cpu() would be a view that keeps all tokens of the batch alive.
        rows = features.to("cpu", torch.float32, copy=True)
        self._finite.see(rows, indices)
        self._parts.append((rows, indices.cpu()))
        self._labels.append(None if labels is None else labels.cpu())

    def finish(self) -> Features:
        """All rows of all processes in dataset order; the collector is empty after it.

        A process holds the result and, while they move into it, the rows that it collected itself; docs/evaluation.md has
        the peak as measured.

        Raises:
            ValueError: if a feature is not finite (names the images), or an image came twice or was left out.
        """
        self._finite.finish()
        no_rows = torch.zeros(0, dtype=torch.int64)
        # Joined first: a part that is a view would travel with all that it is a view of.
        indices = torch.cat([no_rows, *(where for _, where in self._parts)])
        known = [part for part in self._labels if part is not None]
        labels = torch.cat([no_rows, *known]) if len(known) == len(self._labels) else None
        width = self._parts[0][0].shape[1] if self._parts else 0
        everyone = comm.all_gather((indices, labels, width))
        rows_of = [part for part, _, _ in everyone]  # by rank
        order = torch.cat(rows_of)
        if not len(order) or not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError("The loader did not give every image of the dataset exactly once; see InferenceSampler.")
        features = torch.empty(len(order), max(found for _, _, found in everyone))
        while self._parts:
            part, where = self._parts.pop()
            features[where] = part
        _exchange(features, rows_of)
        self._finite, self._labels = FiniteCheck(self.dataset), []
        all_labels = [part for _, part, _ in everyone]
        has_labels = all(part is not None for part in all_labels)
        return Features(features, torch.cat(all_labels)[order.argsort()] if has_labels else None)


def _exchange(features: Tensor, rows_of: Sequence[Tensor]) -> None:
    """Each rank has put its own rows into ``features`` [N, D]; it gets those of the others, a few MiB at a time."""
    if len(rows_of) == 1:
        return
    num_rows = max(1, _EXCHANGED_BYTES // max(1, features.shape[1] * features.element_size()))
    for rank, rows in enumerate(rows_of):
        for part in rows.split(num_rows):
            values = features[part]
            comm.broadcast_on_cpu(values, src=rank)
            if rank != comm.get_rank():
                features[part] = values


def dataset_of(data_loader: Any) -> ImageDataset | None:
    """The dataset behind a loader of ``build_test_loader``; None for other iterables of ImageBatch."""
    dataset = getattr(getattr(data_loader, "dataset", None), "dataset", None)
    return dataset if isinstance(dataset, ImageDataset) else None


def image_feature(output: BackboneOutput, name: str) -> Tensor:
    """One row for each image, of tokens after the final norm.

    Args:
        name: "cls", "mean_patch", or "patch": all patch tokens side by side, row by row of the image.

    Returns:
        [B, D], or [B, patches * D] for "patch".

    Raises:
        ValueError: for another name.
    """
    if name == "cls":
        return output.cls_token
    if name == "mean_patch":
        return output.patch_tokens.mean(1)
    if name == "patch":
        return output.patch_tokens.flatten(1)
    raise ValueError(f"The feature of an image is one of {', '.join(IMAGE_FEATURES)}; got {name!r}.")


def extract_features(model: nn.Module, data_loader: Any, feature: str = "cls") -> Features:
    """One row (after the final norm) of every image of a dataset.

    Args:
        model: images -> BackboneOutput; used in the mode it is in.
        data_loader: ImageBatch of this rank's part.
        feature: a name of ``image_feature``.

    Returns:
        The same Features on every process.
    """
    device = next(model.parameters()).device
    collector = FeatureCollector(dataset_of(data_loader))
    with torch.inference_mode():
        for batch in data_loader:
            rows = image_feature(model(batch.images.to(device)), feature)
            collector.add(rows, batch.labels, batch.indices)
    return collector.finish()


def extract_pixels(data_loader: Any) -> Features:
    """The evaluation crops themselves as features, [N, C*H*W], as the loader gives them: a baseline without any model."""
    collector = FeatureCollector(dataset_of(data_loader))
    for batch in data_loader:
        collector.add(batch.images.flatten(1), batch.labels, batch.indices)
    return collector.finish()
