"""One transformer block."""

from __future__ import annotations

from collections.abc import Sequence
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
        if plan.kernel != "sdpa":
            return self._pass(groups, plan.draws, plan.layouts[0], plan.kernel, picked)
        outputs = []
        for i, (x, of_group, layout) in enumerate(zip(groups, plan.draws, plan.layouts, strict=True)):
            outputs += self._pass([x], [of_group], layout, plan.kernel, None if picked is None else [picked[i]])
        return outputs

    def _pass(
        self,
        groups: Sequence[Tensor],
        draws: Sequence[Draws],
        layout: Layout,
        kernel: str,
        picked: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """All groups as one sequence of rows."""
        if picked is not None:
            return self._pass_picked(groups, draws, layout, kernel, picked)
        rows = _packed([take_kept(x, d.attention).flatten(0, 1) for x, d in zip(groups, draws, strict=True)])
        residual = self._attend(rows, layout, kernel)
        groups = _unpacked_sum(groups, residual, [d.attention for d in draws])
        rows = _packed([take_kept(x, d.ffn).flatten(0, 1) for x, d in zip(groups, draws, strict=True)])
        return _unpacked_sum(groups, self._feed_forward(rows), [d.ffn for d in draws])

    def _pass_picked(
        self,
        groups: Sequence[Tensor],
        draws: Sequence[Draws],
        layout: Layout,
        kernel: str,
        picked: Sequence[Tensor],
    ) -> list[Tensor]:
        kept = [take_kept(x, d.attention).flatten(0, 1) for x, d in zip(groups, draws, strict=True)]
        wanted, attention_factors, ffn_factors, start = [], [], [], 0
        for x, p, d, rows in zip(groups, picked, draws, kept, strict=True):
            places, factors = locate_rows(p, x.shape[1], x.shape[0], d.attention)
            wanted.append(places + start)
            attention_factors.append(factors)
            # All picked rows go through the feed-forward: how many of them a draw keeps, only the device knows.
            ffn_factors.append(locate_rows(p, x.shape[1], x.shape[0], d.ffn)[1])
            start += len(rows)
        stream = _packed([x.flatten(0, 1).index_select(0, p) for x, p in zip(groups, picked, strict=True)])
        stream = _add_rows(stream, self._attend(_packed(kept), layout, kernel, _packed(wanted)), attention_factors)
        stream = _add_rows(stream, self._feed_forward(stream), ffn_factors)
        return list(stream.split([len(p) for p in picked]))

    def _attend(self, rows: Tensor, layout: Layout, kernel: str, wanted: Tensor | None = None) -> Tensor:
        return self.ls1(self.attn(self.norm1(rows), layout, kernel, wanted))

    def _feed_forward(self, rows: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(rows)))


def _packed(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _unpacked_sum(groups: Sequence[Tensor], rows: Tensor, kept: Sequence[KeptSamples | None]) -> list[Tensor]:
    """Each group plus its part of the packed residuals."""
    nums = [(x.shape[0] if k is None else len(k.indices)) * x.shape[1] for x, k in zip(groups, kept, strict=True)]
    parts = [r.unflatten(0, (-1, x.shape[1])) for x, r in zip(groups, rows.split(nums), strict=True)]
    return [add_kept(x, r, k) for x, r, k in zip(groups, parts, kept, strict=True)]


def _add_rows(stream: Tensor, residual: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """``factors``: of each group's rows, or None for 1; None for all groups or for none."""
    given = [f for f in factors if f is not None]
    return stream + (residual * _packed(given) if given else residual)
