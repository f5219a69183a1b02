"""Attention within sequences of several lengths that lie one after the other in one tensor.

Shapes: R rows of all sequences together, H heads, d width of a head. A *group* is a batch of b sequences of T tokens,
(b, T); its b * T rows follow those of the group before.

    sdpa       torch's scaled_dot_product_attention, once per group; every device and dtype
    varlen     torch.nn.attention.varlen, one kernel for all groups; CUDA, 16 bit
    xformers   memory_efficient_attention with a block-diagonal mask, one kernel for all groups; CUDA
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Groups = tuple[tuple[int, int], ...]


class Layout(NamedTuple):
    """Where sequences begin, as a kernel wants to know it.

    Attributes:
        groups: (sequences, tokens of each).
        boundaries: for varlen, [sequences + 1] int32: the first row of each sequence, and R.
        bias: for xformers, its block-diagonal mask.
    """

    groups: Groups
    boundaries: Tensor | None = None
    bias: Any = None


def make_layout(kernel: str, groups: Groups, device: torch.device) -> Layout:
    """The layout of these groups."""
    # Of "sdpa" nothing is to be made; and in an exported model sizes are symbols, which are no keys of a cache.
    return Layout(groups) if kernel == "sdpa" else _made_layout(kernel, groups, device)


@functools.lru_cache(maxsize=256)  # a few shapes per model; what is kept is a vector of integers
def _made_layout(kernel: str, groups: Groups, device: torch.device) -> Layout:
    """Made once, because it goes from host to device."""
    lengths = [tokens for batch, tokens in groups for _ in range(batch)]
    if kernel == "varlen":
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Layout(groups, boundaries=ends.to(device))
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return Layout(groups, bias=BlockDiagonalMask.from_seqlens(lengths, device=device))


def sdpa(qkv: Tensor, num_heads: int, layout: Layout) -> Tensor:
    """[R, 3 * H * d] -> [R, H * d]."""
    parts = [qkv] if len(layout.groups) == 1 else qkv.split([b * t for b, t in layout.groups])
    attended = []
    for rows, group in zip(parts, layout.groups, strict=True):
        # chunk, not unbind of a dimension of 3: its backward makes one copy of the gradient instead of two.
        heads = (x.unflatten(-1, (num_heads, -1)).unflatten(0, group).transpose(1, 2) for x in rows.chunk(3, dim=-1))
        q, k, v = heads  # each [b, H, T, d]
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def varlen(qkv: Tensor, num_heads: int, layout: Layout) -> Tensor:
    """[R, 3 * H * d] -> [R, H * d]."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in qkv.chunk(3, dim=-1))  # each [R, H, d]
    longest = max(tokens for _, tokens in layout.groups)
    assert layout.boundaries is not None
    attended = varlen_attn(q, k, v, layout.boundaries, layout.boundaries, longest, longest)
    assert isinstance(attended, Tensor)
    return attended.flatten(1)


def xformers(qkv: Tensor, num_heads: int, layout: Layout) -> Tensor:
    """[R, 3 * H * d] -> [R, H * d]."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.unflatten(-1, (num_heads, -1)).unsqueeze(0) for x in qkv.chunk(3, dim=-1))  # each [1, R, H, d]
    attended: Tensor = memory_efficient_attention(q, k, v, attn_bias=layout.bias)
    return attended.squeeze(0).flatten(1)


KERNELS: dict[str, Callable[[Tensor, int, Layout], Tensor]] = {"sdpa": sdpa, "varlen": varlen, "xformers": xformers}


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel for MODEL.ATTENTION: ``name`` itself, or for "auto" the rule of that key.

    On CUDA the first of varlen and xformers that works for this dtype and width, tried once on two short sequences; sdpa
    otherwise and on the CPU.

    Raises:
        ValueError: if the kernel that was asked for does not work here; says why.
    """
    if name == "auto":
        candidates = ("varlen", "xformers") if device.type == "cuda" else ()
        return next((kernel for kernel in candidates if not _why_not(kernel, device, dtype, head_dim)), "sdpa")
    if name != "sdpa" and (reason := _why_not(name, device, dtype, head_dim)):
        raise ValueError(
            f"MODEL.ATTENTION {name} does not work on {device.type} in {str(dtype).removeprefix('torch.')} with heads of "
            f"width {head_dim} ({reason}). Use auto or sdpa."
        )
    return name


@functools.cache
def _why_not(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a kernel fails in forward or backward; empty if it works."""
    try:
        with torch.enable_grad():
            # As many as two crops have: which kernel torch takes depends on the length.
            groups = ((1, 197), (1, 37))
            qkv = torch.ones(197 + 37, 3 * head_dim, device=device, dtype=dtype, requires_grad=True)
            KERNELS[kernel](qkv, 1, make_layout(kernel, groups, device)).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError, OSError) as error:
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""
