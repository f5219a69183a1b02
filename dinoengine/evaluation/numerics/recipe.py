"""Sizes, schedules and parameter groups of the published recipes.

The figures were read from the published weight files and measured by running the published training code.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import torch

from dinoengine.config import get_cfg
from dinoengine.evaluation.numerics.quantity import Quantity
from dinoengine.modeling import DINOHead, VisionTransformer
from dinoengine.modeling.backbone import VIT_SIZES
from dinoengine.modeling.layers.mlp import SwiGLU
from dinoengine.solver import build_lr_scheduler, build_teacher_schedules, param_groups

# Released file -> (row of the size table, registers, parameters, tensors)
RELEASED_FILES = {
    "dinov2_vits14": ("small", 0, 22_056_576, 175),
    "dinov2_vits14_reg4": ("small", 4, 22_058_112, 176),
    "dinov2_vitb14": ("base", 0, 86_580_480, 175),
    "dinov2_vitb14_reg4": ("base", 4, 86_583_552, 176),
    "dinov2_vitl14": ("large", 0, 304_368_640, 343),
    "dinov2_vitl14_reg4": ("large", 4, 304_372_736, 344),
    "dinov2_vitg14": ("giant", 0, 1_136_480_768, 567),
    "dinov2_vitg14_reg4": ("giant", 4, 1_136_486_912, 568),
}
# Head -> (feature width, prototypes, bottleneck, millions of parameters)
HEADS = {
    "ViT-L/16 short": (1024, 65536, 256, 23.66),
    "ViT-g/14 DINO": (1536, 131072, 384, 58.59),
    "ViT-g/14 iBOT": (1536, 131072, 256, 41.55),
}
# Schedule -> {iteration: value as measured, with all its digits}, of the short recipe (ViT-L/16, batch 2048) and of
# ViT-L/14 (batch 3072). "0" is exact.
SHORT_RECIPE = {
    "LR": {
        0: "0",
        1: "4.526e-7",
        1249: "5.653e-4",
        12500: "5.6569e-3",
        37500: "4.995e-3",
        62500: "3.320e-3",
        100000: "6.626e-4",
    },
    "last-layer LR": {1249: "0", 12500: "5.6569e-3"},
    "weight decay": {0: "0.040000", 37500: "0.114199", 62500: "0.220000", 100000: "0.365623"},
    "teacher momentum": {0: "0.992000", 37500: "0.993649", 62500: "0.996000", 100000: "0.999236"},
    "teacher temperature": {0: "0.040000", 37500: "0.070000", 124999: "0.070000"},
}
VITL14_RECIPE = {
    "LR": {100000: "3.4641e-4"},
    "weight decay": {100000: "0.0498955"},
    "teacher momentum": {100000: "0.994371"},
}
VITL14_KEYS = {
    "SOLVER.IMS_PER_BATCH": 3072,
    "SOLVER.BASE_LR": 2e-4,
    "SOLVER.MAX_ITER": 625000,
    "SOLVER.WARMUP_ITERS": 100000,
    "SOLVER.WEIGHT_DECAY_END": 0.2,
    "MODEL.TEACHER.MOMENTUM": 0.994,
}
# Parameter of ViT-L -> LR multiplier with SOLVER.LAYER_DECAY 0.9 and SOLVER.PATCH_EMBED_LR_MULT 0.2
LR_MULTIPLIERS = {
    "cls_token": 0.07179,
    "pos_embed": 0.07179,
    "mask_token": 0.07179,
    "patch_embed.proj.weight": 0.01436,
    "blocks.0.attn.qkv.weight": 0.07977,
    "blocks.23.mlp.fc2.weight": 0.9,
    "norm.weight": 1.0,
}


def check_sizes() -> Iterator[Quantity]:
    """Parameters and tensors of every released backbone, of the heads, and the SwiGLU widths; on the meta device."""
    with torch.device("meta"):
        for name, (size, registers, parameters, tensors) in RELEASED_FILES.items():
            vit = VisionTransformer(
                img_size=(518, 518),
                patch_size=14,
                ffn="swiglu" if size == "giant" else "mlp",
                num_register_tokens=registers,
                **VIT_SIZES[size]._asdict(),
            )
            state, file = vit.state_dict(), f"file {name}_pretrain.pth"
            yield Quantity(f"parameters, {name}", file, parameters, sum(t.numel() for t in state.values()))
            yield Quantity(f"tensors, {name}", file, tensors, len(state))
        for name, (width, prototypes, bottleneck, millions) in HEADS.items():
            head = DINOHead(width, num_prototypes=prototypes, bottleneck_dim=bottleneck)
            got = sum(p.numel() for p in head.parameters()) / 1e6
            yield Quantity(f"parameters of a head, millions, {name}", "published recipe", millions, got, 5e-3)
        for width, hidden in ((1024, 2736), (1536, 4096)):
            got = SwiGLU(width).w3.in_features
            yield Quantity(f"SwiGLU hidden width at {width}", "published files and shapes", hidden, got)


def check_schedules() -> Iterator[Quantity]:
    """Values of every schedule at chosen iterations; the default config is the short recipe."""
    yield from _schedule_values("short recipe", {}, SHORT_RECIPE)
    yield from _schedule_values("ViT-L/14 recipe", VITL14_KEYS, VITL14_RECIPE)


def _schedule_values(recipe: str, keys: dict[str, float], expected: dict[str, dict[int, str]]) -> Iterator[Quantity]:
    cfg = get_cfg()
    cfg.merge_from_list([word for pair in keys.items() for word in pair])
    solver = build_lr_scheduler(cfg, optimizer=None)  # type: ignore[arg-type]
    teacher = build_teacher_schedules(cfg)
    schedules = {
        "LR": solver.lr,
        "last-layer LR": solver.last_layer_lr,
        "weight decay": solver.weight_decay,
        "teacher momentum": teacher["teacher_momentum"],
        "teacher temperature": teacher["teacher_temp"],
    }
    for name, values in expected.items():
        for iteration, written in values.items():
            got = schedules[name](iteration)
            label, source = f"{name}, iteration {iteration}, {recipe}", f"published {recipe}, measured"
            yield Quantity(label, source, float(written), got, _half_last_digit(written))


def _half_last_digit(written: str) -> float:
    exponent = Decimal(written).as_tuple().exponent
    assert isinstance(exponent, int), written
    return 0.0 if written == "0" else 0.5 * 10.0**exponent


def check_param_groups() -> Iterator[Quantity]:
    """LR multipliers and the number of groups of ViT-L's backbone."""
    with torch.device("meta"):
        vit = VisionTransformer(img_size=(224, 224), patch_size=16, **VIT_SIZES["large"]._asdict())
    groups = param_groups(vit, layer_decay=0.9, patch_embed_lr_mult=0.2)
    yield Quantity("parameter groups, ViT-L backbone", "published code, fused groups", 52, len(groups))
    for name, expected in LR_MULTIPLIERS.items():
        (got,) = (group["lr_mult"] for group in groups if name in group["param_names"])
        yield Quantity(f"LR multiplier, ViT-L, {name}", "published short recipe, decay 0.9", expected, got, 5e-6)
    decayed = {name for group in groups if group["wd_mult"] for name in group["param_names"]}
    by_name = {n for n in vit.state_dict() if not (n.endswith(".bias") or "norm" in n or "gamma" in n)}
    yield Quantity("parameters decayed otherwise, ViT-L", "rule of names", 0, len(decayed ^ by_name))
