"""From teacher logits to target distributions: centring or Sinkhorn-Knopp. One copy, for CLS and for patches.

Both see the batch of all ranks, so targets do not depend on how many processes share it. No gradient flows through
targets. Shapes: M rows on this rank (they may differ between ranks, and be 0), K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.modeling.losses.precision import at_least_fp32
from dinoengine.utils import comm


class Centering(nn.Module):
    """softmax((logits - center) / temp), the centre a moving average of the logits (DINO, arXiv:2104.14294, Eq. 4).

    The centre used for a batch does not contain that batch: call ``update`` after ``forward``. The mean is over all
    rows of all ranks. (The published iBOT centre averages the means of the ranks, which depends on their number.)
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """[M, K] logits -> [M, K] probabilities, fp32."""
        return F.softmax((at_least_fp32(logits) - self.center) / temp, dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """center = momentum * center + (1 - momentum) * mean of the rows of all ranks.

        Unchanged without rows, and where they are not finite: that step is skipped, and a NaN would stay for ever.
        """
        rows = at_least_fp32(logits)
        total = comm.all_reduce_sum(torch.cat((rows.sum(0), rows.new_full((1,), rows.shape[0]))))
        mean = (total[:-1] / total[-1].clamp(min=1)).to(self.center.dtype)
        is_usable = (total[-1] > 0) & torch.isfinite(total).all()  # a tensor: no host synchronisation
        updated = torch.lerp(self.center, mean.unsqueeze(0), 1 - self.momentum)
        self.center.copy_(torch.where(is_usable, updated, self.center))


class SinkhornKnopp(nn.Module):
    """Targets whose prototypes are used equally often (SwAV, arXiv:2006.09882, section 3.1; no state).

    Q = exp(logits / temp); then ``num_iters`` times: each prototype's sum over all rows becomes 1 / K, each row's sum
    1 / M. The result times M has rows that sum to 1.

    The largest logit of *all* rows is subtracted before exp, which cancels exactly and prevents overflow. A maximum
    per row would not cancel within a few iterations.
    """

    def __init__(self, num_iters: int = 3) -> None:
        super().__init__()
        self.num_iters = num_iters

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """[M, K] logits -> [M, K] probabilities, at least fp32. M may be 0 on some or all ranks."""
        scaled = at_least_fp32(logits) / temp
        num_prototypes = scaled.shape[1]
        lowest = scaled.new_full((), torch.finfo(scaled.dtype).min)
        largest = comm.all_reduce_max(scaled.max() if scaled.numel() else lowest)
        num_rows = comm.all_reduce_sum(scaled.new_full((), scaled.shape[0])).clamp(min=1)
        q = (scaled - largest).exp()
        for _ in range(self.num_iters):
            # Tiny floors: a prototype or row that underflowed to 0 stays 0 instead of becoming NaN.
            prototype_sums = comm.all_reduce_sum(q.sum(0, keepdim=True))
            q = q / (prototype_sums * num_prototypes).clamp(min=torch.finfo(q.dtype).tiny)
            q = q / (q.sum(1, keepdim=True) * num_rows).clamp(min=torch.finfo(q.dtype).tiny)
        return q * num_rows

    def update(self, logits: Tensor) -> None:
        """Nothing to keep between batches."""


def build_targets(
    kind: str, num_prototypes: int, *, center_momentum: float, sinkhorn_iters: int
) -> Centering | SinkhornKnopp:
    """MODEL.LOSS.CENTERING "centering" or "sinkhorn_knopp".

    Raises:
        ValueError: for another kind.
    """
    if kind == "centering":
        return Centering(num_prototypes, center_momentum)
    if kind == "sinkhorn_knopp":
        return SinkhornKnopp(sinkhorn_iters)
    raise ValueError(f"MODEL.LOSS.CENTERING must be 'centering' or 'sinkhorn_knopp', got {kind!r}.")
