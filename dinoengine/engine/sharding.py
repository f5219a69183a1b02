"""Which parts of a model are sharded together (MODEL.PARALLEL fsdp)."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from dinoengine.modeling.heads.dino_head import DINOHead
from dinoengine.modeling.layers.block import Block


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
