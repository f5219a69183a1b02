"""Backbones by name."""

from __future__ import annotations

from typing import Any

from dinoengine.config import CfgNode
from dinoengine.modeling.backbone.backbone import Backbone
from dinoengine.utils.registry import Registry

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = """Name -> a Backbone class or function, called as ``(cfg)`` for a student and
``(cfg, drop_path_rate=0.0)`` for a teacher.

It returns a ``Backbone``; one without stochastic depth ignores the second argument.
"""


def build_backbone(cfg: CfgNode, *, for_teacher: bool = False) -> Backbone:
    """The backbone MODEL.BACKBONE.NAME; without stochastic depth for a teacher."""
    overrides: dict[str, Any] = {"drop_path_rate": 0.0} if for_teacher else {}
    return BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, **overrides)
