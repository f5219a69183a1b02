"""A model and a loader small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinoengine.structures import BackboneOutput, ImageBatch


class LinearFeatures(nn.Module):
    """images [B, C, H, W] -> CLS token = flattened pixels @ weight, in the dtype of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(0.5)
        self.frozen_norm = nn.BatchNorm1d(weight.shape[1])

    def forward(self, images: Tensor) -> BackboneOutput:
        cls_token = self.dropout(images.flatten(1).to(self.weight.dtype) @ self.weight)
        nothing = cls_token[:, None][:, :0]
        return BackboneOutput(cls_token, register_tokens=nothing, patch_tokens=nothing, grid=(0, 0))


def identity_features(dim: int) -> LinearFeatures:
    """Features that are the pixels themselves; in eval mode."""
    return LinearFeatures(torch.eye(dim)).eval()


def make_loader(
    features: Tensor, labels: Tensor | None, batch_size: int = 3, order: Sequence[int] | None = None
) -> list[ImageBatch]:
    """Batches of float "images" [B, 1, 1, D] whose pixels are the given rows; visited in ``order``."""
    indices = torch.tensor(range(len(features)) if order is None else order, dtype=torch.int64)
    return [
        ImageBatch(features[part][:, None, None], None if labels is None else labels[part], part)
        for part in indices.split(batch_size)
    ]
