"""Stochastic depth that skips the work, not only the result."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class KeptSamples(NamedTuple):
    """The part of a batch of B samples that goes through a residual branch.

    Attributes:
        indices: [b] int64, without repetition.
        scale: B / b, the factor of their residuals: the expectation over draws is that of the whole batch.
    """

    indices: Tensor
    scale: float


def draw_kept(batch: int, drop_rate: float, device: torch.device) -> KeptSamples | None:
    """Exactly ``max(int(batch * (1 - drop_rate)), 1)`` samples, drawn from torch's generator of the device.

    None, without a draw, where nothing is dropped (DINOv2, arXiv:2304.07193, section 5 "Efficient stochastic depth").
    """
    if drop_rate == 0.0:
        return None
    num_kept = max(int(batch * (1.0 - drop_rate)), 1)
    return KeptSamples(torch.randperm(batch, device=device)[:num_kept], batch / num_kept)


def take_kept(x: Tensor, kept: KeptSamples | None) -> Tensor:
    """[B, ...] -> [b, ...]; ``x`` itself for None."""
    return x if kept is None else x.index_select(0, kept.indices)


def add_kept(x: Tensor, residual: Tensor, kept: KeptSamples | None) -> Tensor:
    """``x`` [B, ...] plus the scaled residuals [b, ...] of the kept samples, in the dtype of ``x``."""
    if kept is None:
        return x + residual
    # index_add needs one dtype; the residual stream's wins, so that no precision is lost.
    sum_: Tensor = _AddKept.apply(x, residual.to(x.dtype), kept.indices, kept.scale)
    return sum_


class _AddKept(torch.autograd.Function):
    """``x.index_add(0, indices, residual, alpha=scale)`` that keeps the indices alone for its backward pass.

    torch's own keeps the residual as well, for its shape: in bf16 a sixth of all that a ViT-L step keeps.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, residual: Tensor, indices: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.index_add(0, indices, residual, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return gradient, gradient.index_select(0, indices) * ctx.scale, None, None


def locate_rows(rows: Tensor, num_tokens: int, batch: int, kept: KeptSamples | None) -> tuple[Tensor, Tensor | None]:
    """Where rows of a batch lie among the tokens of its kept samples, without asking the device how many do.

    Args:
        rows: [P] int64, indices into the B * T tokens of the batch.
        num_tokens: T.
        batch: B.

    Returns:
        [P] indices into the b * T tokens of the kept samples (any valid one where the sample is not kept), and the factor
        of the residual of each row, [P, 1]: the scale, or 0 where the sample is not kept; None for 1.
    """
    if kept is None:
        return rows, None
    num_kept = kept.indices.shape[0]
    slots = torch.zeros(batch, dtype=torch.int64, device=rows.device)
    slots = slots.index_copy(0, kept.indices, torch.arange(num_kept, device=rows.device))
    factors = torch.zeros(batch, device=rows.device).index_fill(0, kept.indices, kept.scale)
    samples = rows // num_tokens
    return slots[samples] * num_tokens + rows % num_tokens, factors[samples].unsqueeze(1)
