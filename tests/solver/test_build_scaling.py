"""Moving a recipe to another number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from dinoengine.config import CfgNode, get_cfg
from dinoengine.solver import build_lr_scheduler, build_teacher_schedules, scale_config_to_world_size

RECIPE = [
    "SOLVER.REFERENCE_WORLD_SIZE=8",
    "SOLVER.IMS_PER_BATCH=256",
    "SOLVER.MAX_ITER=1000",
    "SOLVER.WARMUP_ITERS=100",
    "SOLVER.FREEZE_LAST_LAYER_ITERS=12",
    "SOLVER.CHECKPOINT_PERIOD=50",
    "MODEL.TEACHER.TEMP_WARMUP_ITERS=300",
    "TEST.EVAL_PERIOD=40",
    "SOLVER.BASE_LR=0.1",
]


def _cfg(*overrides: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(overrides)
    return cfg


def _scaled_values(cfg: CfgNode) -> dict[str, Any]:
    return {
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "max": cfg.SOLVER.MAX_ITER,
        "warmup": cfg.SOLVER.WARMUP_ITERS,
        "freeze": cfg.SOLVER.FREEZE_LAST_LAYER_ITERS,
        "checkpoint": cfg.SOLVER.CHECKPOINT_PERIOD,
        "temp": cfg.MODEL.TEACHER.TEMP_WARMUP_ITERS,
        "eval": cfg.TEST.EVAL_PERIOD,
        "reference": cfg.SOLVER.REFERENCE_WORLD_SIZE,
    }


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """caplog that also works when the package's logger was set up not to propagate."""
    logger = logging.getLogger("dinoengine.solver")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "dinoengine.solver")
    yield caplog
    logger.removeHandler(caplog.handler)


def test_scaling_keeps_the_batch_per_process_and_the_images_seen() -> None:
    expected = {
        2: {
            "batch": 64,
            "max": 4000,
            "warmup": 400,
            "freeze": 48,
            "checkpoint": 200,
            "temp": 1200,
            "eval": 160,
            "reference": 2,
        },
        16: {
            "batch": 512,
            "max": 500,
            "warmup": 50,
            "freeze": 6,
            "checkpoint": 25,
            "temp": 150,
            "eval": 20,
            "reference": 16,
        },
    }
    for world_size, values in expected.items():
        assert _scaled_values(scale_config_to_world_size(_cfg(*RECIPE), world_size)) == values


@pytest.mark.parametrize("rule, factor", [("sqrt", 1 / 2), ("linear", 1 / 4), ("none", 1 / 4)])
def test_scaling_moves_the_peak_lr_once(rule: str, factor: float) -> None:
    cfg = _cfg(*RECIPE, f"SOLVER.LR_SCALING={rule}")
    scaled = scale_config_to_world_size(cfg, 2)
    expected = 0.025 if rule == "none" else 0.1
    assert expected == scaled.SOLVER.BASE_LR
    before, after = (build_lr_scheduler(c, None).lr(c.SOLVER.WARMUP_ITERS) for c in (cfg, scaled))  # type: ignore[arg-type]
    assert after == pytest.approx(factor * before, rel=1e-12)


def test_a_scaled_run_has_the_schedules_of_the_original_stretched_in_time() -> None:
    cfg = _cfg(*RECIPE, "SOLVER.LR_SCALING=sqrt")
    scaled = scale_config_to_world_size(cfg, 2)
    old, new = (build_teacher_schedules(c)["teacher_momentum"] for c in (cfg, scaled))
    assert [new(4 * i) for i in range(1001)] == pytest.approx([old(i) for i in range(1001)], rel=1e-12)


@pytest.mark.parametrize("reference, world_size", [(0, 5), (8, 8), (0, 1)])
def test_scaling_does_nothing_without_a_reference_or_on_the_reference(reference: int, world_size: int) -> None:
    cfg = _cfg(*RECIPE, f"SOLVER.REFERENCE_WORLD_SIZE={reference}")
    before = cfg.clone()
    assert scale_config_to_world_size(cfg, world_size) is cfg
    assert cfg == before


@pytest.mark.parametrize("frozen", [True, False])
def test_scaling_leaves_the_original_alone_and_keeps_the_frozen_state(frozen: bool) -> None:
    cfg = _cfg(*RECIPE)
    before = cfg.clone()
    if frozen:
        cfg.freeze()
    scaled = scale_config_to_world_size(cfg, 4)
    assert cfg == before
    assert cfg.is_frozen() == scaled.is_frozen() == scaled.SOLVER.is_frozen() == frozen


def test_scaling_twice_scales_once() -> None:
    scaled = scale_config_to_world_size(_cfg(*RECIPE), 4)
    assert scale_config_to_world_size(scaled, 4) is scaled
    back = scale_config_to_world_size(scaled, 8)
    assert _scaled_values(back) == _scaled_values(_cfg(*RECIPE))


def test_scaling_says_what_it_changed(log: pytest.LogCaptureFixture) -> None:
    scale_config_to_world_size(_cfg(*RECIPE, "SOLVER.LR_SCALING=none"), 2)
    assert "made for 8 processes, running on 2: batch 256 -> 64, MAX_ITER 1000 -> 4000" in log.text
    assert "BASE_LR 0.1 -> 0.025" in log.text


def test_scaling_needs_a_batch_per_process_to_keep() -> None:
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH 250 is not divisible by SOLVER.REFERENCE_WORLD_SIZE 8"):
        scale_config_to_world_size(_cfg(*RECIPE, "SOLVER.IMS_PER_BATCH=250"), 2)


def test_scaling_a_tiny_run_up_leaves_at_least_one_iteration() -> None:
    cfg = _cfg("SOLVER.REFERENCE_WORLD_SIZE=1", "SOLVER.IMS_PER_BATCH=1", "SOLVER.MAX_ITER=1")
    assert scale_config_to_world_size(cfg, 64).SOLVER.MAX_ITER == 1


def test_scaling_keeps_what_is_switched_off_switched_off() -> None:
    scaled = scale_config_to_world_size(_cfg(*RECIPE, "SOLVER.CHECKPOINT_PERIOD=0", "TEST.EVAL_PERIOD=0"), 2)
    assert scaled.SOLVER.CHECKPOINT_KEEP_EVERY == 0
    assert scaled.SOLVER.CHECKPOINT_PERIOD == scaled.TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize("key", ["SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_KEEP_EVERY", "TEST.EVAL_PERIOD"])
def test_scaling_never_switches_a_period_off(key: str) -> None:
    cfg = _cfg("SOLVER.REFERENCE_WORLD_SIZE=1", "SOLVER.IMS_PER_BATCH=4", f"{key}=20")
    group, leaf = key.split(".")
    assert scale_config_to_world_size(cfg, 64)[group][leaf] >= 1
