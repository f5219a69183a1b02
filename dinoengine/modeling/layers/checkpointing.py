"""Activation checkpointing: computing part of the forward pass again in the backward pass instead of keeping it.

    none        everything is kept
    selective   results of matrix products and attention are kept; norms, GELU, LayerScale and sums are computed again
    full        only the input of each block is kept; the block is computed again

Memory falls and time rises from one to the next; gradients are the same (arXiv:1604.06174; selective: arXiv:2205.05198).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_MODES = ("none", "selective", "full")
# By name: which of them exist, and which of them an attention ends in, depends on torch's version and the device.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
# Of torch's kernels for one length and for several, and of those that xformers calls.
_PARTS_OF_ATTENTIONS = ("attention", "varlen_attn", "flash_fwd")


def run_checkpointed(mode: str, block: nn.Module, *args: Any) -> list[Tensor]:
    """``block(*args)`` with MODEL.ACTIVATION_CHECKPOINTING ``mode``; the block must draw no random numbers.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"MODEL.ACTIVATION_CHECKPOINTING must be one of {', '.join(_MODES)}; got {mode!r}.")
    if mode == "none":
        return block(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    outputs: list[Tensor] = checkpoint(block, *args, **options)
    return outputs


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    is_kept = name.split(".")[0] in _PRODUCTS or any(part in name for part in _PARTS_OF_ATTENTIONS)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
