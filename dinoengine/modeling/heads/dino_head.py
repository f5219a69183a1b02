"""The projection head of DINO (arXiv:2104.14294, section 3.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode, configurable
from dinoengine.modeling.heads.build import HEAD_REGISTRY
from dinoengine.structures import ParamFacts


class WeightNormLinear(nn.Module):
    """x -> x w^T with w = g * v / |v| per row; names and values as torch's old ``weight_norm`` stored them."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))  # trainable, unlike DINO's norm_last_layer
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # nn.Linear's default, as published

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return F.linear(x, weight)


@HEAD_REGISTRY.register()
class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, weight-normalised prototypes."""

    @configurable
    def __init__(
        self,
        in_dim: int,
        *,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
    ) -> None:
        """
        Args:
            in_dim: feature width D.
            num_prototypes: K.
            num_layers: linear layers before the prototypes, >= 1; 1 maps straight to the bottleneck.
        """
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [nn.GELU()] if i else []
            layers.append(nn.Linear(before, after))
            nn.init.trunc_normal_(layers[-1].weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_dim: int) -> dict[str, Any]:
        """``cfg`` is MODEL.DINO_HEAD or MODEL.IBOT_HEAD."""
        return {
            "in_dim": in_dim,
            "num_prototypes": cfg.NUM_PROTOTYPES,
            "hidden_dim": cfg.HIDDEN_DIM,
            "bottleneck_dim": cfg.BOTTLENECK_DIM,
            "num_layers": cfg.NUM_LAYERS,
        }

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., K]; the number of rows may be 0."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(x, dim=-1, eps=eps))

    def param_facts(self, name: str) -> ParamFacts:
        """Never slowed by layer decay; biases are not decayed, ``last_layer.weight_g`` is (as published)."""
        role = "last_layer" if name.startswith("last_layer.") else ""
        return ParamFacts(layer_id=0, num_layers=-1, weight_decay=not name.endswith("bias"), role=role)
