"""Wrapping a model for several processes, and unwrapping it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dinoengine.config import CfgNode
from dinoengine.engine.sharding import is_to_be_sharded
from dinoengine.utils import comm


def create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    """``model`` itself in a single process, else wrapped in DistributedDataParallel.

    Buffers are not broadcast at each step: centres are computed from all ranks and agree by construction.

    Args:
        fp16_compression: send gradients as fp16.
        kwargs: passed on to DistributedDataParallel.
    """
    if not comm.is_distributed():
        return model
    # torch 2.15 calls it forward_sync_buffers and warns of the old name.
    known = inspect.signature(DistributedDataParallel).parameters
    kwargs.setdefault("forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers", False)
    kwargs.setdefault("gradient_as_bucket_view", True)  # no second copy of the gradients in memory
    if "device_ids" not in kwargs and next(model.parameters()).is_cuda:
        kwargs["device_ids"] = [comm.get_local_rank()]
    ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(state=None, hook=fp16_compress_hook)
    return ddp


def wrap_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """What is trained: ``create_ddp_model`` with the options of MODEL.DDP, or a sharded model as it is."""
    if is_to_be_sharded(cfg):
        return model
    options = cfg.MODEL.DDP
    return create_ddp_model(
        model, fp16_compression=options.FP16_COMPRESSION, find_unused_parameters=options.FIND_UNUSED_PARAMETERS
    )


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel or torch.compile wrapper, or the model itself."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
