"""Figures that the published training states or shows, each against what is built here.

Figures about schedules, groups, sizes and single layers stand with the tests of their modules; here are those that
concern several, or the method as it starts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import BlockMasking, MaskPlan
from dinoengine.modeling import build_model
from dinoengine.modeling.backbone import VIT_SIZES, VisionTransformer
from dinoengine.modeling.heads import DINOHead
from dinoengine.solver import build_lr_scheduler
from dinoengine.structures import SSLBatch
from tests.data.test_masking import _published_mask

# The published short recipe (ViT-L/16, 32 GPUs x 64 images, epochs of 1250 iterations) in our keys.
SHORT_RECIPE = {
    "MODEL.VIT.SIZE": "large",
    "MODEL.VIT.PATCH_SIZE_PX": 16,
    "MODEL.VIT.DROP_PATH_RATE": 0.3,
    "MODEL.VIT.DROP_PATH_UNIFORM": True,
    "MODEL.VIT.LAYER_SCALE_INIT": 1e-5,
    "MODEL.VIT.FFN": "mlp",
    "MODEL.VIT.QKV_BIAS": True,
    "MODEL.VIT.PROJ_BIAS": True,
    "MODEL.VIT.FFN_BIAS": True,
    "MODEL.VIT.NUM_REGISTER_TOKENS": 0,
    "MODEL.VIT.INTERPOLATE_ANTIALIAS": False,
    "MODEL.VIT.INTERPOLATE_OFFSET": 0.1,
    "MODEL.DINO_HEAD.NUM_PROTOTYPES": 65536,
    "MODEL.DINO_HEAD.BOTTLENECK_DIM": 256,
    "MODEL.DINO_HEAD.NUM_LAYERS": 3,
    "MODEL.DINO_HEAD.HIDDEN_DIM": 2048,
    "MODEL.IBOT_HEAD.SEPARATE": False,
    "MODEL.LOSS.DINO_WEIGHT": 1.0,
    "MODEL.LOSS.KOLEO_WEIGHT": 0.1,
    "MODEL.LOSS.IBOT_WEIGHT": 1.0,
    "MODEL.LOSS.CENTERING": "centering",
    "MODEL.LOSS.CENTER_MOMENTUM": 0.9,
    "MODEL.LOSS.STUDENT_TEMP": 0.1,
    "MODEL.TEACHER.MOMENTUM": 0.992,
    "MODEL.TEACHER.MOMENTUM_END": 1.0,
    "MODEL.TEACHER.WARMUP_TEMP": 0.04,
    "MODEL.TEACHER.TEMP": 0.07,
    "MODEL.TEACHER.TEMP_WARMUP_ITERS": 30 * 1250,
    "INPUT.MASK.CROP_SHARE": 0.5,
    "INPUT.MASK.RATIO": (0.1, 0.5),
    "INPUT.GLOBAL_CROPS.SIZE_PX": (224,),
    "INPUT.GLOBAL_CROPS.SCALE": (0.32, 1.0),
    "INPUT.LOCAL_CROPS.NUM": 8,
    "INPUT.LOCAL_CROPS.SIZE_PX": (96,),
    "INPUT.LOCAL_CROPS.SCALE": (0.05, 0.32),
    "INPUT.HFLIP_PROB": 0.5,
    "INPUT.COLOR_JITTER.PROB": 0.8,
    "INPUT.COLOR_JITTER.BRIGHTNESS": 0.4,
    "INPUT.COLOR_JITTER.CONTRAST": 0.4,
    "INPUT.COLOR_JITTER.SATURATION": 0.2,
    "INPUT.COLOR_JITTER.HUE": 0.1,
    "INPUT.GRAYSCALE_PROB": 0.2,
    "INPUT.BLUR.PROBS": (0.0, 0.9, 0.5),  # as applied
    "INPUT.BLUR.KERNEL_SIZE_PX": 9,
    "INPUT.BLUR.SIGMA_PX": (0.1, 2.0),
    "INPUT.SOLARIZE.PROBS": (0.0, 0.2, 0.0),
    "INPUT.SOLARIZE.THRESHOLD": 128,
    "MODEL.PIXEL_MEAN": (0.485, 0.456, 0.406),
    "MODEL.PIXEL_STD": (0.229, 0.224, 0.225),
    "SOLVER.IMS_PER_BATCH": 32 * 64,
    "SOLVER.MAX_ITER": 100 * 1250,
    "SOLVER.BASE_LR": 4e-3,
    "SOLVER.LR_SCALING": "sqrt",
    "SOLVER.REFERENCE_BATCH_SIZE": 1024,
    "SOLVER.MIN_LR": 1e-6,
    "SOLVER.WARMUP_ITERS": 10 * 1250,
    "SOLVER.FREEZE_LAST_LAYER_ITERS": 1250,
    "SOLVER.LAYER_DECAY": 0.9,
    "SOLVER.PATCH_EMBED_LR_MULT": 0.2,
    "SOLVER.WEIGHT_DECAY": 0.04,
    "SOLVER.WEIGHT_DECAY_END": 0.4,
    "SOLVER.BETAS": (0.9, 0.999),
    "SOLVER.EPS": 1e-8,
    "SOLVER.CLIP_GRAD_NORM": 3.0,
    "TEST.KNN.K": (10, 20, 100, 200),
    "TEST.KNN.TEMPERATURE": 0.07,
}


@pytest.mark.parametrize("key", SHORT_RECIPE)
def test_the_defaults_are_the_short_recipe(key: str) -> None:
    node: Any = get_cfg()
    for name in key.split("."):
        node = node[name]
    assert node == SHORT_RECIPE[key]


@pytest.mark.parametrize(("base_lr", "batch", "peak"), [(4e-3, 2048, 5.657e-3), (2e-4, 3072, 3.464e-4)])
def test_published_peak_learning_rates(base_lr: float, batch: int, peak: float) -> None:
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH = base_lr, batch
    schedule = build_lr_scheduler(cfg, optimizer=None)  # type: ignore[arg-type]
    assert schedule.lr(cfg.SOLVER.WARMUP_ITERS) == pytest.approx(peak, rel=2e-4)


# ---- sizes


@pytest.mark.parametrize(
    ("in_dim", "num_prototypes", "bottleneck_dim", "millions"),
    [(1024, 65536, 256, 23.66), (1536, 131072, 384, 58.59), (1536, 131072, 256, 41.55)],
    ids=["ViT-L default", "ViT-g dino", "ViT-g ibot"],
)
def test_published_sizes_of_the_heads(in_dim: int, num_prototypes: int, bottleneck_dim: int, millions: float) -> None:
    with torch.device("meta"):
        head = DINOHead(in_dim, num_prototypes=num_prototypes, bottleneck_dim=bottleneck_dim)
    widths = [in_dim, 2048, 2048, bottleneck_dim]
    by_hand = sum((a + 1) * b for a, b in zip(widths[:-1], widths[1:], strict=True))
    by_hand += num_prototypes * (bottleneck_dim + 1)
    assert sum(p.numel() for p in head.parameters()) == by_hand
    assert by_hand / 1e6 == pytest.approx(millions, abs=5e-3)


@pytest.mark.parametrize(
    ("size", "patch", "ffn", "shapes"),
    [
        ("large", 16, "mlp", {"pos_embed": (1, 197, 1024), "blocks.23.mlp.fc1.weight": (4096, 1024)}),
        (
            "large",
            14,
            "swiglu",
            {
                "pos_embed": (1, 257, 1024),
                "blocks.0.mlp.w12.weight": (5472, 1024),
                "blocks.0.mlp.w3.weight": (1024, 2736),
            },
        ),
        (
            "giant",
            14,
            "swiglu",
            {
                "pos_embed": (1, 257, 1536),
                "blocks.39.mlp.w12.weight": (8192, 1536),
                "blocks.39.mlp.w12.bias": (8192,),
                "blocks.39.mlp.w3.weight": (1536, 4096),
            },
        ),
    ],
)
def test_published_shapes_of_training_at_224(size: str, patch: int, ffn: str, shapes: dict[str, tuple]) -> None:
    with torch.device("meta"):
        vit = VisionTransformer(img_size=(224, 224), patch_size=patch, ffn=ffn, **VIT_SIZES[size]._asdict())
    state = vit.state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert VIT_SIZES[size].embed_dim // VIT_SIZES[size].num_heads == 64


# ---- masking


@pytest.mark.parametrize(("pixels", "patch", "largest"), [(224, 16, 98), (224, 14, 128), (518, 14, 1369 // 2)])
def test_largest_masked_block(pixels: int, patch: int, largest: int) -> None:
    """As published but for 518/14, where a cut of floats to whole numbers made it 666."""
    assert BlockMasking((pixels // patch, pixels // patch)).max_block_patches == largest


@pytest.mark.parametrize(("batch_size", "bound"), [(64, 3771), (8, 507), (1, 98)])
def test_masked_patches_stay_below_the_published_bound(batch_size: int, bound: int) -> None:
    """The published code pads its buffer to this bound; the largest count of every stratum, added up."""
    edges = np.linspace(0.1, 0.5, batch_size + 1)[1:]
    assert sum(int(196 * edge) for edge in edges) == bound
    plan = MaskPlan(BlockMasking((14, 14)), batch_size=batch_size, seed=0)
    totals = [plan.counts(index).sum() for index in range(500)]
    assert max(totals) <= bound
    assert max(totals) > 0.97 * bound - 6  # and no lower: strata are used up to their edges


def test_the_published_generator_masks_14_85_percent_and_ours_what_it_aims_at() -> None:
    """Stopping short explains the difference between the published 14.85 % and our 14.87 %."""
    rng = np.random.default_rng(0)
    wanted = np.concatenate([(196 * rng.uniform(*_edges(64))).astype(int) for _ in range(12)])
    reached = np.array([_published_mask(14, 14, int(n), rng).sum() for n in wanted])
    assert (reached == wanted).mean() == pytest.approx(0.92, abs=0.05)
    assert 0.994 < reached.sum() / wanted.sum() <= 1.0
    assert 0.5 * reached.mean() / 196 == pytest.approx(0.1485, abs=2e-4)
    plan = MaskPlan(BlockMasking((14, 14)), batch_size=64, seed=0)
    assert np.mean([plan.counts(i).mean() for i in range(100)]) / 196 == pytest.approx(0.1487, abs=2e-4)


def _edges(num_strata: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(0.1, 0.5, num_strata + 1)
    return edges[:-1], edges[1:]


# ---- the losses as they start


def _default_batch(images: int = 4) -> SSLBatch:
    generator = torch.Generator().manual_seed(0)
    return SSLBatch(
        global_crops=torch.randint(0, 256, (2 * images, 3, 32, 32), generator=generator, dtype=torch.uint8),
        local_crops=torch.randint(0, 256, (8 * images, 3, 16, 16), generator=generator, dtype=torch.uint8),
        masks=torch.stack([torch.arange(4) < (2 if crop % 2 else 0) for crop in range(2 * images)]),
        positions=torch.arange(images),
        num_local_views=8,
    )


def test_losses_start_at_the_published_values() -> None:
    """With 65,536 prototypes the published logs begin at 10.03 (local), 1.254 (global) and 5.62 (iBOT, shown as half).

    While all CLS tokens are alike the targets are uniform, so a cross entropy is log sum exp(z / 0.1) - mean(z) / 0.1.
    The logits are cosines with random prototypes in 256 dimensions: mean 0, variance 1/256. So it is
    ln 65536 + 1 / (2 * 256 * 0.1 ** 2) = 11.0904 + 0.1953 = 11.2857, 16/18 and 2/18 of which are the DINO terms.
    """
    cfg: CfgNode = get_cfg()
    cfg.merge_from_list(["MODEL.VIT.SIZE=micro", "INPUT.GLOBAL_CROPS.SIZE_PX=32"])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = _default_batch()
    with torch.no_grad():
        # Before the first step the centre is 0; a start from the mean of the logits shows the state of the next ones.
        tokens = model.teacher["backbone"](model.pixel_norm(batch.global_crops))
        model.dino_targets.center.copy_(model.teacher["dino_head"](tokens.cls_token).mean(0))
        model.ibot_targets.center.copy_(model.teacher["dino_head"](tokens.patch_tokens[batch.masks]).mean(0))
        values = {term.name: term.value.item() for term in model(batch).terms}
    cross_entropy = math.log(65536) + 1 / (2 * 256 * 0.1**2)
    assert cross_entropy == pytest.approx(11.2857, abs=5e-5)
    assert values["dino_local"] == pytest.approx(10.03, abs=0.02)
    assert values["dino_global"] == pytest.approx(1.254, abs=0.003)
    # Half of the crops are masked, so half of a cross entropy.
    assert values["ibot"] == pytest.approx(0.5 * cross_entropy, abs=0.1)
