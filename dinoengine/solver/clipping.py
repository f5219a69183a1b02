"""Gradient clipping, one L2 norm per sub-module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@torch.no_grad()
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
    gradients = {name: [_local(p.grad) for p in group if p.grad is not None] for name, group in groups.items()}
    norms = {name: torch.nn.utils.get_total_norm(of_group) for name, of_group in gradients.items()}
    meshes = [p.device_mesh for group in groups.values() for p in group if hasattr(p, "device_mesh")]
    if meshes:  # all are split in the same way
        norms = _summed_over_shares(norms, meshes[0])
    for name, of_group in gradients.items():
        if max_norm > 0 and of_group:
            limit = (max_norm / (norms[name] + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(of_group, torch.where(norms[name].isfinite(), limit, 1.0))
        elif not of_group and groups[name]:
            norms[name] = norms[name].to(groups[name][0].device)  # without gradients it is on the CPU
    return norms


def _local(gradient: Tensor) -> Tensor:
    """The share of this process: operators on DTensors cost the host a hundred microseconds each."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _summed_over_shares(norms: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Norms of whole gradients from those of the shares, in one reduction for all groups.

    Args:
        mesh: its last dimension splits the model.
    """
    squares = torch.stack([norm.to(mesh.device_type).square() for norm in norms.values()])
    dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    return dict(zip(norms, squares.sqrt().unbind(), strict=True))
