"""A model split among processes (MODEL.PARALLEL fsdp; torch's FSDP2): what is split together, building it, gathering it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.engine.precision import PRECISIONS
from dinoengine.modeling.heads.dino_head import DINOHead
from dinoengine.modeling.layers.block import Block
from dinoengine.utils import comm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardingUnit(NamedTuple):
    """Parameters that are gathered and scattered together.

    Attributes:
        modules: whose parameters; called one after the other.
        is_product: only matrix products, which may be gathered in the type they are computed in.
    """

    modules: list[nn.Module]
    is_product: bool


def sharding_units(model: nn.Module) -> list[ShardingUnit]:
    """Attention and FFN of each block, the layers of each head, its prototypes; of student and teacher alike.

    What belongs to none (norms, LayerScale, tokens, the position table, the patch embedding, a backbone of another kind) is
    one more unit, which the whole model is: small, in fp32, gathered once a step.
    """
    units = []
    for module in model.modules():
        if isinstance(module, Block):
            units.append(ShardingUnit([module.attn, module.mlp], is_product=True))
        elif isinstance(module, DINOHead):
            units.append(ShardingUnit([module.mlp], is_product=True))
            units.append(ShardingUnit([module.last_layer], is_product=False))
    return units


def training_device(cfg: CfgNode) -> torch.device:
    """Of this process: its GPU, or the CPU."""
    return torch.device("cuda", comm.get_local_rank()) if cfg.MODEL.DEVICE == "cuda" else torch.device("cpu")


def is_to_be_sharded(cfg: CfgNode) -> bool:
    """Whether there are processes to split the model among, and MODEL.PARALLEL asks for it."""
    return cfg.MODEL.PARALLEL == "fsdp" and comm.is_distributed()


def build_sharded(cfg: CfgNode, build: Callable[[CfgNode], nn.Module]) -> nn.Module:
    """A model of which each process holds its share alone, with the values that ``build`` gives in one process.

    Each process builds it on "meta", without memory, and gets room for its share. The first one builds it once more in CPU
    memory and sends every parameter out. A collective operation.

    Args:
        build: of a config with MODEL.DEVICE "cpu" or "cuda"; on "meta" inside of ``torch.device("meta")``.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = build(cfg)
    device = training_device(cfg)
    compute_dtype = PRECISIONS[cfg.SOLVER.AMP.PRECISION] if cfg.SOLVER.AMP.ENABLED else None
    shard(model, device, compute_dtype, cfg.MODEL.FSDP.GROUP_SIZE)
    model.to_empty(device=device)
    state: dict[str, Any] = {}
    if comm.is_main_process():
        on_cpu = cfg.clone()
        on_cpu.defrost()
        on_cpu.MODEL.DEVICE = "cpu"
        source = build(on_cpu)
        state = source.state_dict()
        for mine, his in zip(model.buffers(), source.buffers(), strict=True):
            mine.copy_(his)
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )
    for buffer in model.buffers():  # also those that are in no state dict
        torch.distributed.broadcast(buffer, src=0)
    return model


def shard(model: nn.Module, device: torch.device, compute_dtype: torch.dtype | None, group_size: int = 0) -> None:
    """Make the parameters of ``model`` DTensors, split along their first dimension among processes; in place.

    Products are gathered in ``compute_dtype`` (None: fp32), all else in fp32: the residual stream, LayerScale and norms
    stay as precise as in one process, and inputs are not cast. Gradients are averaged over all processes, in fp32.

    Args:
        group_size: neighbouring processes that split one copy; a divisor of their number. 0: all of them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = _mesh(device.type, group_size or comm.get_world_size())
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    products = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in sharding_units(model):
        fully_shard(unit.modules, mesh=mesh, mp_policy=products if unit.is_product else exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    if hasattr(model, "split_batch"):  # runs the teacher outside of ``forward``
        register_fsdp_forward_method(model, "split_batch")


def _mesh(device_type: str, group_size: int) -> DeviceMesh:
    """One row: all split one model. Several: each row splits a copy, columns hold the same share."""
    from torch.distributed.device_mesh import init_device_mesh

    num_groups = comm.get_world_size() // group_size
    if num_groups == 1:
        return init_device_mesh(device_type, (group_size,))
    return init_device_mesh(device_type, (num_groups, group_size), mesh_dim_names=("copy", "share"))


def gathered_model(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A whole copy of a sharded model on each process, to be evaluated; any other model itself. A collective operation.

    A sharded forward pass is an exchange of all processes, and an evaluation gives them different numbers of batches.

    Args:
        build: makes a model of the same kind, on "meta" inside of ``torch.device("meta")``.
    """
    if not hasattr(model, "set_requires_gradient_sync"):
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with torch.device("meta"):
        whole = build()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(state, assign=True)  # takes the tensors themselves: no second whole copy
    for name, buffer in model.named_buffers():  # also those that are in no state dict
        owner, _, last = name.rpartition(".")
        setattr(whole.get_submodule(owner), last, buffer.clone())
    if hasattr(model, "teacher_temp"):  # set by a hook
        whole.teacher_temp = model.teacher_temp
    return whole.train(model.training)
