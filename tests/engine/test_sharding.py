"""What is sharded together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine.sharding import build_sharded, sharding_units
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


@pytest.mark.parametrize(
    ("enabled", "precision", "expected"),
    [
        (True, "bf16", torch.bfloat16),
        (True, "fp32", torch.float32),  # what "auto" may choose
        (False, "bf16", torch.float32),
    ],
)
def test_products_are_gathered_in_the_precision_of_the_run(
    tiny_cfg: CfgNode, tmp_path: Path, enabled: bool, precision: str, expected: torch.dtype
) -> None:
    tiny_cfg.merge_from_list(["SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.PRECISION", precision, "SEED", 0])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build_sharded(tiny_cfg, build_model)
        seen: dict[str, torch.dtype] = {}
        backbone = model.student["backbone"]  # type: ignore[index, union-attr]
        for name, layer in (("product", backbone.blocks[0].attn.qkv), ("norm", backbone.blocks[0].norm1)):
            layer.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, m.weight.dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=expected == torch.bfloat16):
            model(next(iter(build_train_loader(tiny_cfg))))
    finally:
        dist.destroy_process_group()
    assert seen == {"product": expected, "norm": torch.float32}
