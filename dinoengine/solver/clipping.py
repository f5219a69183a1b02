"""Gradient clipping, one L2 norm per sub-module."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def clip_grad_norms_(groups: dict[str, list[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Scale each group's gradients in place so that their L2 norm is at most ``max_norm``.

    Sub-modules are clipped apart, as the published DINOv2 code does: the heads' gradients at the start are much
    larger than the backbone's and would otherwise decide its step.

    Gradients whose norm is not finite stay as they are: their step is not done, and they tell what went wrong.

    Args:
        groups: named parameter lists; parameters without gradient are passed over.
        max_norm: 0 measures only.

    Returns:
        The norm of each group before clipping, fp32 scalars on the parameters' device.
    """
    norms = {}
    for name, parameters in groups.items():
        with_grad = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
        if hasattr(norm, "full_tensor"):  # of sharded gradients: summed up over the processes here
            norm = norm.full_tensor()
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, torch.where(norm.isfinite(), norm, 0.0))
        norms[name] = norm.to(parameters[0].device) if parameters else norm  # without gradients it is on the CPU
    return norms
