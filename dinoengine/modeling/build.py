"""Meta-architectures by name."""

from __future__ import annotations

from torch import nn

from dinoengine.config import CfgNode
from dinoengine.utils.registry import Registry

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = """Name -> an ``nn.Module`` class, called as ``(cfg)``: a whole training method.

It must have
    ``forward(batch: SSLBatch) -> LossTerms``, in training mode (a classifier takes an ImageBatch with labels);
    ``param_facts(name) -> ParamFacts`` for every trainable parameter;
    ``clip_groups() -> dict[str, list[Parameter]]``, the parts whose gradients are clipped apart;
    ``feature_model() -> FeatureModel``, what evaluation runs: images -> BackboneOutput.
It may have
    ``update_teacher(momentum)``, called after each optimizer step, and ``teacher_temp``, set before each step;
    ``split_batch(batch, n) -> list[SSLBatch]``, micro-batches that share what belongs to the whole batch.
"""


def build_model(cfg: CfgNode) -> nn.Module:
    """The meta-architecture MODEL.META_ARCHITECTURE, on the CPU, in training mode."""
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
