"""What is sharded together."""

from __future__ import annotations

from dinoengine.config import CfgNode
from dinoengine.engine.sharding import sharding_units
from dinoengine.modeling import build_model


def test_units_are_the_blocks_and_the_heads_of_both_sides(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.VIT.DEPTH = 2
    model = build_model(tiny_cfg)
    units = sharding_units(model)
    # Twice: 2 blocks, the layers of the head, its prototypes.
    assert [unit.is_product for unit in units] == [True, True, True, False] * 2
    block = model.student["backbone"].blocks[0]  # type: ignore[index, union-attr]
    assert units[0].modules == [block.attn, block.mlp]
    inside = {id(p) for unit in units for module in unit.modules for p in module.parameters()}
    outside = {".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if id(p) not in inside}
    assert outside == {
        "backbone.cls_token",
        "backbone.pos_embed",
        "backbone.mask_token",
        "proj.weight",
        "proj.bias",
        "norm.weight",
        "norm.bias",
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "ls1.gamma",
        "ls2.gamma",
    }
