"""Per-channel scale of a residual branch (arXiv:2103.17239)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x * gamma. Under autocast x is bf16 or fp16 and gamma fp32, so the product is fp32, like the residual stream."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
