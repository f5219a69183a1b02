"""Attention of packed sequences the plain way: all scores, those of other sequences masked out."""

from __future__ import annotations

import torch
from torch import Tensor

from dinoengine.modeling.layers.attention_kernels import Layout


def dense(qkv: Tensor, num_heads: int, layout: Layout) -> Tensor:
    """A kernel like those of ``attention_kernels.KERNELS``."""
    lengths = torch.tensor([tokens for batch, tokens in layout.groups for _ in range(batch)])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths).to(qkv.device)  # of each row
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(0, 1) for x in qkv.chunk(3, dim=-1))  # [H, R, d]
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(sequence[:, None] != sequence[None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
