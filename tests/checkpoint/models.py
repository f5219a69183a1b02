"""Small backbones with random weights, so that a wrong mapping changes the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.weights import BackboneSpec, Weights
from dinoengine.modeling.heads.dino_head import DINOHead

SMALL = BackboneSpec(
    embed_dim=64,
    depth=3,
    num_heads=1,
    patch_size=7,
    in_chans=3,
    table_grid=(4, 4),
    num_register_tokens=0,
    ffn="mlp",
    ffn_hidden=256,
    layer_scale=True,
    qkv_bias=True,
    proj_bias=True,
    ffn_bias=True,
    interpolate_antialias=False,
    interpolate_offset=0.1,
)
WITH_REGISTERS = replace(SMALL, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
SWIGLU = replace(SMALL, ffn="swiglu", ffn_hidden=176)
WITHOUT_SCALE = replace(SMALL, layer_scale=False)


def random_entries(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Its state dict with every entry random, norms and scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        is_scale = name.endswith(("gamma", "weight_g")) or (value.ndim == 1 and name.endswith("weight"))
        entries[name] = 1 + 0.3 * noise if is_scale else 0.1 * noise
    return entries


def random_weights(spec: BackboneSpec = SMALL, layout: str = "meta", heads: bool = False, **more: Any) -> Weights:
    parts = {"backbone": random_entries(spec.build())}
    if heads:
        for i, name in enumerate(("dino_head", "ibot_head")):
            head = DINOHead(spec.embed_dim, num_prototypes=12 + i, hidden_dim=20, bottleneck_dim=8)
            parts[name] = random_entries(head, seed=i + 1)
    return Weights(layout, spec, parts | more)
