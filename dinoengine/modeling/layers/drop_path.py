"""Stochastic depth that skips the work, not only the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def add_residual(x: Tensor, branch: Callable[[Tensor], Tensor], drop_rate: float) -> Tensor:
    """x + branch(x), where a random part of the batch skips the branch.

    Exactly ``max(int(B * (1 - drop_rate)), 1)`` samples are kept, drawn from torch's generator of the device. Their
    branch is scaled by B / kept, so the expectation over draws is x + branch(x). The others cost nothing (DINOv2,
    arXiv:2304.07193, section 5 "Efficient stochastic depth").

    Args:
        x: [B, T, D], the residual stream (fp32 also under autocast).
        branch: maps [b, T, D] to [b, T, D] for any b.
        drop_rate: share of samples that skip; 0 gives the plain sum.
    """
    if drop_rate == 0.0:
        return x + branch(x)
    batch = x.shape[0]
    num_kept = max(int(batch * (1.0 - drop_rate)), 1)
    kept = torch.randperm(batch, device=x.device)[:num_kept]
    residual = branch(x[kept])
    # index_add needs one dtype; the residual stream's wins, so that no precision is lost.
    return x.index_add(0, kept, residual.to(x.dtype), alpha=batch / num_kept)
