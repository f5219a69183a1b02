"""Projection heads by name."""

from __future__ import annotations

from torch import nn

from dinoengine.config import CfgNode
from dinoengine.utils.registry import Registry

HEAD_REGISTRY = Registry("HEAD")
HEAD_REGISTRY.__doc__ = """Name -> an ``nn.Module`` class, called as ``(cfg_node, in_dim=D)``.

``cfg_node`` is MODEL.DINO_HEAD or MODEL.IBOT_HEAD. It maps [..., D] to [..., K] logits and has ``param_facts(name)``.
"""


def build_head(head_cfg: CfgNode, name: str, in_dim: int) -> nn.Module:
    """The head ``name`` with the sizes of ``head_cfg`` (MODEL.DINO_HEAD or MODEL.IBOT_HEAD)."""
    return HEAD_REGISTRY.get(name)(head_cfg, in_dim=in_dim)
