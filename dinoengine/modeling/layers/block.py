"""One transformer block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinoengine.modeling.layers.attention import Attention
from dinoengine.modeling.layers.attention_kernels import Groups, Layout, make_layout
from dinoengine.modeling.layers.drop_path import KeptSamples, add_kept, draw_kept, locate_rows, take_kept
from dinoengine.modeling.layers.layer_scale import LayerScale
from dinoengine.modeling.layers.mlp import FFN_LAYERS

LAYER_NORM_EPS = 1e-6


class Draws(NamedTuple):
    """Who of one group goes through each branch of a block; None: all."""

    attention: KeptSamples | None
    ffn: KeptSamples | None


class BlockPlan(NamedTuple):
    """What a pass through a block needs beside the tokens; see ``Block.plan``.

    Attributes:
        draws: one per group.
        layouts: sequences among the samples that attention keeps, one per call of its kernel.
        kernel: a key of ``attention_kernels.KERNELS``.
    """

    draws: tuple[Draws, ...]
    layouts: tuple[Layout, ...]
    kernel: str


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with LayerScale and stochastic depth of its own draw.

    It takes several *groups*, batches of sequences of one length each (global and local crops). With a kernel for
    sequences of several lengths they go through the layers packed as one; with "sdpa" one after the other: on a CPU the
    copies would cost more than larger matrix products give.

    The residual stream stays fp32 under autocast: with LayerScale at 1e-5 the branches are smaller than a bf16 step of
    the stream, and a 16-bit sum would lose the early signal.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        layer_scale_init: float = 1e-5,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.ls1 = LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = FFN_LAYERS[ffn](dim, ratio=ffn_ratio, bias=ffn_bias)
        self.ls2 = LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()

    def draw(self, batch: int, device: torch.device) -> Draws:
        """Stochastic depth for a group of ``batch`` sequences; in eval mode everything is kept."""
        rate = self.drop_path_rate if self.training else 0.0
        return Draws(draw_kept(batch, rate, device), draw_kept(batch, rate, device))

    @staticmethod
    def plan(groups: Groups, draws: Sequence[Draws], device: torch.device, kernel: str = "sdpa") -> BlockPlan:
        """Lays out what is kept of groups of (sequences, tokens).

        Drawing and planning are apart from ``forward``, which so does the same when it is run once more (activation
        checkpointing), and asks the device for nothing.
        """
        kept = tuple(
            (batch if d.attention is None else len(d.attention.indices), tokens)
            for (batch, tokens), d in zip(groups, draws, strict=True)
        )
        calls = [(group,) for group in kept] if kernel == "sdpa" else [kept]
        return BlockPlan(tuple(draws), tuple(make_layout(kernel, call, device) for call in calls), kernel)

    def forward(
        self, groups: Sequence[Tensor], plan: BlockPlan | None = None, picked: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Each [B, T, D] -> [B, T, D]; with ``picked`` only the tokens that are needed: [P, D].

        Args:
            plan: None: drawn now, and group by group.
            picked: for each group [P] int64, indices into its B * T tokens. Attention still sees all tokens; its output
                layer and the feed-forward run on these alone, which makes a last block cheap.
        """
        if plan is None:
            shapes = tuple((g.shape[0], g.shape[1]) for g in groups)
            draws = [self.draw(batch, groups[0].device) for batch, _ in shapes]
            plan = self.plan(shapes, draws, groups[0].device)
        if picked is not None:
            return self._forward_picked(groups, plan, picked)
        for branch, kept in (
            (self._attend, [d.attention for d in plan.draws]),
            (self._feed_forward, [d.ffn for d in plan.draws]),
        ):
            rows = [take_kept(x, k).flatten(0, 1) for x, k in zip(groups, kept, strict=True)]
            residuals = _in_calls(lambda r, call, branch=branch: branch(r, plan, call), rows, plan)  # type: ignore[misc]
            groups = [
                add_kept(x, r.unflatten(0, (-1, x.shape[1])), k)
                for x, r, k in zip(groups, residuals, kept, strict=True)
            ]
        return list(groups)

    def _forward_picked(self, groups: Sequence[Tensor], plan: BlockPlan, picked: Sequence[Tensor]) -> list[Tensor]:
        stream = [x.flatten(0, 1).index_select(0, p) for x, p in zip(groups, picked, strict=True)]
        located, attention_factors, ffn_factors = [], [], []
        for x, p, draws in zip(groups, picked, plan.draws, strict=True):
            places, factor = locate_rows(p, x.shape[1], x.shape[0], draws.attention)
            located.append(places)
            attention_factors.append(factor)
            # All picked rows go through the feed-forward: how many of them a draw keeps, only the device knows.
            ffn_factors.append(locate_rows(p, x.shape[1], x.shape[0], draws.ffn)[1])
        rows = [take_kept(x, d.attention).flatten(0, 1) for x, d in zip(groups, plan.draws, strict=True)]
        if plan.kernel != "sdpa":
            starts = [0, *accumulate(len(r) for r in rows)][: len(rows)]
            located = [torch.cat([places + start for places, start in zip(located, starts, strict=True)])]
        residuals = _in_calls(lambda r, call: self._attend(r, plan, call, located[call]), rows, plan, stream)
        stream = [_add_rows(x, r, f) for x, r, f in zip(stream, residuals, attention_factors, strict=True)]
        residuals = _in_calls(lambda r, call: self._feed_forward(r, plan, call), stream, plan)
        return [_add_rows(x, r, f) for x, r, f in zip(stream, residuals, ffn_factors, strict=True)]

    def _attend(self, rows: Tensor, plan: BlockPlan, call: int, wanted: Tensor | None = None) -> Tensor:
        return self.ls1(self.attn(self.norm1(rows), plan.layouts[call], plan.kernel, wanted))

    def _feed_forward(self, rows: Tensor, plan: BlockPlan, call: int) -> Tensor:
        return self.ls2(self.mlp(self.norm2(rows)))


def _in_calls(
    branch: Callable[[Tensor, int], Tensor],
    rows: Sequence[Tensor],
    plan: BlockPlan,
    results: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``branch`` on the rows of each group, or on all of them packed; ``results`` says how many rows come out."""
    if plan.kernel == "sdpa":
        return [branch(r, call) for call, r in enumerate(rows)]
    return list(branch(torch.cat(list(rows)), 0).split([len(r) for r in results or rows]))


def _add_rows(x: Tensor, residual: Tensor, factor: Tensor | None) -> Tensor:
    return x + (residual if factor is None else residual * factor)
