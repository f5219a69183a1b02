"""Operations and kept bytes from shapes, beside what torch counts in a step."""

from __future__ import annotations

import pytest
import torch

from dinoengine.config import CfgNode, get_cfg
from dinoengine.engine.probe import measure_flops, measure_saved_bytes
from dinoengine.engine.workload import (
    Workload,
    activation_bytes,
    recomputed_flops,
    require_known_parts,
    step_flops,
    workspace_bytes,
)
from dinoengine.modeling import build_model
from dinoengine.structures import SSLBatch
from tests.conftest import TINY

# Wide enough that what is not counted (norms, indices, the table of positions) is small beside what is.
WIDE = {
    "MODEL.VIT.EMBED_DIM": 96,
    "MODEL.VIT.DEPTH": 3,
    "MODEL.VIT.DROP_PATH_RATE": 0.3,
    "INPUT.GLOBAL_CROPS.SIZE_PX": 32,
    "INPUT.LOCAL_CROPS.SIZE_PX": 16,
    "MODEL.DINO_HEAD.NUM_PROTOTYPES": 512,
    "MODEL.DINO_HEAD.HIDDEN_DIM": 128,
    "MODEL.DINO_HEAD.BOTTLENECK_DIM": 64,
    "SOLVER.IMS_PER_BATCH": 6,
}
VARIANTS = {
    "mlp, one head": {},
    "swiglu, registers, no LayerScale": {
        "MODEL.VIT.FFN": "swiglu",
        "MODEL.VIT.NUM_REGISTER_TOKENS": 4,
        "MODEL.VIT.LAYER_SCALE_INIT": 0.0,
        "MODEL.VIT.DROP_PATH_RATE": 0.0,
    },
    "two heads": {"MODEL.IBOT_HEAD.SEPARATE": True, "MODEL.IBOT_HEAD.NUM_PROTOTYPES": 256},
    "dino alone": {"MODEL.LOSS.IBOT_WEIGHT": 0.0},
    "patches alone": {"MODEL.LOSS.DINO_WEIGHT": 0.0},
    "selective": {"MODEL.ACTIVATION_CHECKPOINTING": "selective"},
    "selective, swiglu": {"MODEL.ACTIVATION_CHECKPOINTING": "selective", "MODEL.VIT.FFN": "swiglu"},
    "full": {"MODEL.ACTIVATION_CHECKPOINTING": "full"},
    "micro-batches": {"SOLVER.NUM_MICRO_BATCHES": 3, "MODEL.LOSS.KOLEO_GROUP_SIZE": 2},
}


def _cfg(changes: dict[str, object]) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([str(word) for pair in {**TINY, **WIDE, **changes}.items() for word in pair])
    return cfg


def _batch(cfg: CfgNode) -> tuple[SSLBatch, float]:
    """A batch with the planned number of masked patches as nearly as whole patches allow, and that number."""
    images = cfg.SOLVER.IMS_PER_BATCH
    draw = torch.Generator().manual_seed(0)
    masks = torch.zeros(2 * images, 64, dtype=torch.bool)
    masks[::2, :19] = True  # half the crops, 0.3 of 64 patches
    pixels = [
        torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)
        for n, size in ((2 * images, 32), (2 * images, 16))
    ]
    return SSLBatch(*pixels, masks, torch.arange(images), 2, 2), float(masks.sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_estimates_are_what_torch_counts(variant: str) -> None:
    cfg = _cfg(VARIANTS[variant])
    torch.manual_seed(0)
    model = require_known_parts(build_model(cfg))
    work = Workload.of(cfg, 1)
    batch, num_masked = _batch(cfg)
    num_parts = cfg.SOLVER.NUM_MICRO_BATCHES
    if cfg.MODEL.LOSS.IBOT_WEIGHT:
        assert work.masked == pytest.approx(num_masked / num_parts, rel=0.02)
    operations = step_flops(model, work) + recomputed_flops(model, work)
    part = batch.split(num_parts)[0]
    assert operations == pytest.approx(measure_flops(model, part) / len(part), rel=0.01)
    kept = sum(activation_bytes(model, work).values())
    assert kept == pytest.approx(measure_saved_bytes(model, batch, num_parts), rel=0.05)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_products_in_16_bits_keep_half_and_a_copy_of_the_weights(mode: str) -> None:
    cfg = _cfg({"SOLVER.AMP.ENABLED": True, "MODEL.ACTIVATION_CHECKPOINTING": mode})
    model = require_known_parts(build_model(cfg))
    batch, _ = _batch(cfg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = measure_saved_bytes(model, batch)
    parts = activation_bytes(model, Workload.of(cfg, 1))
    assert sum(parts.values()) == pytest.approx(measured, rel=0.08)
    # 3 blocks of 96 x 96 x (3 + 1 + 4 + 4) weights and patches of 48 values, 2 bytes each.
    assert parts["weights in 16 bits"] == 2 * ((mode == "none") * 3 * 96 * 96 * 12 + 48 * 96)


def test_a_block_by_hand() -> None:
    """One crop size, one block, no heads worth mentioning: every product written out."""
    cfg = _cfg(
        {
            "MODEL.VIT.DEPTH": 1,
            "MODEL.VIT.DROP_PATH_RATE": 0.0,
            "INPUT.LOCAL_CROPS.NUM": 0,
            "MODEL.LOSS.IBOT_WEIGHT": 0.0,
        }
    )
    model = require_known_parts(build_model(cfg))
    tokens, width = 65, 96
    # Queries, keys and values of all tokens; the rest of the block, which is the last one, of the CLS token alone.
    block = 2 * tokens * width * width * 3 + 2 * 2 * tokens * tokens * width + 2 * width * width * 9
    embedding = 2 * 64 * 48 * width
    head = 2 * (96 * 128 + 128 * 128 + 128 * 64 + 64 * 512)
    expected = 2 * ((1 + 3) * block + (1 + 2) * embedding + (1 + 3) * head)
    assert step_flops(model, Workload.of(cfg, 1)) == expected


def test_sizes_follow_the_share_of_a_process() -> None:
    cfg = _cfg({"SOLVER.IMS_PER_BATCH": 24, "SOLVER.NUM_MICRO_BATCHES": 2})
    model = require_known_parts(build_model(cfg))
    one, four = Workload.of(cfg, 1), Workload.of(cfg, 4)
    assert (one.images, four.images) == (12, 3)
    assert workspace_bytes(model, one) == 4 * workspace_bytes(model, four)


def test_models_of_unknown_parts_are_refused(classifier_cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match="not of ImageClassifier"):
        require_known_parts(build_model(classifier_cfg))
    model = build_model(_cfg({}))
    model.student["dino_head"] = torch.nn.Linear(96, 8)  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="The dino_head is a Linear"):
        require_known_parts(model)
