from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.config import CfgNode, get_cfg, validate
from dinoengine.modeling import build_model
from dinoengine.solver import build_optimizer
from dinoengine.solver.report import LayerRow, layer_table, schedule_values, schedule_warnings, turning_points

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = nn.Linear(2, 2)  # schedules do not depend on the model


def _recipe(name: str, *overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    cfg.merge_from_list(overrides)
    return cfg


# Published schedules, observed by running the published code: recipe, iteration, schedule, value to the digits given.
GOLDEN = [
    ("dinov2/vitl16_short", 0, "lr", 0.0, 0.0),
    ("dinov2/vitl16_short", 1, "lr", 4.526e-7, 5e-11),
    ("dinov2/vitl16_short", 1249, "lr", 5.653e-4, 5e-8),
    ("dinov2/vitl16_short", 1249, "last_layer_lr", 0.0, 0.0),
    ("dinov2/vitl16_short", 1250, "last_layer_lr", 5.657e-4, 5e-8),
    ("dinov2/vitl16_short", 12500, "lr", 5.6569e-3, 5e-8),
    ("dinov2/vitl16_short", 37500, "lr", 4.995e-3, 5e-7),
    ("dinov2/vitl16_short", 37500, "weight_decay", 0.114199, 5e-7),
    ("dinov2/vitl16_short", 37500, "teacher_momentum", 0.993649, 5e-7),
    ("dinov2/vitl16_short", 37500, "teacher_temp", 0.07, 0.0),
    ("dinov2/vitl16_short", 62500, "lr", 3.320e-3, 5e-7),
    ("dinov2/vitl16_short", 62500, "weight_decay", 0.22, 1e-12),
    ("dinov2/vitl16_short", 62500, "teacher_momentum", 0.996, 1e-12),
    ("dinov2/vitl16_short", 100000, "lr", 6.626e-4, 5e-8),
    ("dinov2/vitl16_short", 100000, "weight_decay", 0.365623, 5e-7),
    ("dinov2/vitl16_short", 100000, "teacher_momentum", 0.999236, 5e-7),
    ("dinov2/vitl14", 100000, "lr", 3.4641e-4, 5e-9),
    ("dinov2/vitl14", 100000, "weight_decay", 0.0498955, 5e-8),
    ("dinov2/vitl14", 100000, "teacher_momentum", 0.994371, 5e-7),
    ("dinov2/vitg14", 100000, "lr", 3.4641e-4, 5e-9),
    # Cerebras: sqrt(2048 / 1024) * 4e-3 and 4e-3, after a tenth of the run
    ("cerebras/large_224_bs2048", 12500, "lr", 5.6569e-3, 5e-8),
    ("cerebras/large_patch14_224_bs1024", 12500, "lr", 4e-3, 1e-12),
]


@pytest.mark.parametrize("recipe, iteration, name, value, tolerance", GOLDEN)
def test_published_schedule_values_come_out(
    recipe: str, iteration: int, name: str, value: float, tolerance: float
) -> None:
    assert schedule_values(_recipe(recipe), MODEL, [iteration])[name] == [pytest.approx(value, abs=tolerance, rel=0)]


def test_values_are_columns_in_the_order_asked() -> None:
    columns = schedule_values(get_cfg(), MODEL, [5, 0])
    assert columns["iteration"] == [5, 0]
    assert columns["lr"][1] == 0 < columns["lr"][0]
    assert list(columns) == ["iteration", "lr", "last_layer_lr", "weight_decay", "teacher_momentum", "teacher_temp"]


@pytest.fixture(scope="module")
def vit_large() -> nn.Module:
    with torch.device("meta"):
        return build_model(get_cfg())


def test_layer_factors_are_those_published(vit_large: nn.Module) -> None:
    table = layer_table(get_cfg(), vit_large)
    factors = {row.layer: row.lr_mult for row in table}
    assert factors["tokens and positions"] == pytest.approx(0.07179, abs=5e-6)
    assert factors["patch embedding"] == pytest.approx(0.01436, abs=5e-6)
    assert factors["block 0"] == pytest.approx(0.07977, abs=5e-6)
    assert factors["block 23"] == pytest.approx(0.9)
    assert factors["final norm"] == factors["outside the blocks"] == factors["prototypes"] == 1.0


def test_table_counts_each_trainable_parameter_once(vit_large: nn.Module) -> None:
    table = layer_table(get_cfg(), vit_large)
    student = sum(p.numel() for p in vit_large.student.parameters())
    assert sum(row.num_params for row in table) == student
    width = 1024
    # block 0 without decay: two norms and two LayerScales, biases of qkv, attention output and both FFN layers
    assert LayerRow("block 0", pytest.approx(0.9**24), 0.0, (4 + 2 + 3 + 1 + 4 + 1) * width) in table
    assert LayerRow("block 0", pytest.approx(0.9**24), 1.0, 12 * width**2) in table
    # mask token, CLS token, positions of CLS and 14 x 14 patches
    assert LayerRow("tokens and positions", pytest.approx(0.9**25), 1.0, (1 + 1 + 197) * width) in table
    assert LayerRow("prototypes", 1.0, 1.0, 65536 * (256 + 1)) in table


def test_table_goes_from_input_to_output(vit_large: nn.Module) -> None:
    layers = list(dict.fromkeys(row.layer for row in layer_table(get_cfg(), vit_large)))
    blocks = [f"block {i}" for i in range(24)]
    ends = ["final norm", "outside the blocks", "prototypes"]
    assert layers == ["patch embedding", "tokens and positions", *blocks, *ends]


def test_the_backbone_has_the_published_number_of_groups(vit_large: nn.Module) -> None:
    groups = build_optimizer(get_cfg(), vit_large).param_groups
    assert sum(any(n.startswith("student.backbone") for n in group["param_names"]) for group in groups) == 52


def test_a_model_that_states_nothing_is_one_layer() -> None:
    rows = layer_table(get_cfg(), nn.Linear(3, 5))
    assert rows == [LayerRow("outside the blocks", 1.0, 1.0, 15), LayerRow("outside the blocks", 1.0, 0.0, 5)]


def test_turning_points_lie_inside_the_run() -> None:
    points = turning_points(get_cfg())
    assert {0, 1, 1249, 1250, 12499, 12500, 37500, 62500, 124999} <= set(points)
    assert turning_points(_recipe("dinov2/vitl16_short", "SOLVER.MAX_ITER", 1)) == [0]
    assert max(turning_points(_recipe("dinov2/vitl16_short", "SOLVER.MAX_ITER", 100))) == 99
    assert {3999, 4000, 5999, 6000} <= set(turning_points(_recipe("dinov2/vits14_continue")))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_have_no_warning(path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    assert schedule_warnings(cfg, MODEL) == []


# overrides -> what the one warning says
WARNINGS = [
    # A known reference config: a schedule for 2,250,000 iterations in a run of 225,000.
    (
        ("SOLVER.MAX_ITER", 225000, "SOLVER.WARMUP_ITERS", 360000),
        r"never reaches its peak 0\.005657: .*360000 .*62\.5%",
    ),
    (("SOLVER.MAX_ITER", 50000, "SOLVER.WARMUP_ITERS", 50000), "far from SOLVER.MIN_LR.*only 0 iterations"),
    (("SOLVER.MAX_ITER", 50003, "SOLVER.WARMUP_ITERS", 50000), "far from SOLVER.MIN_LR.*only 3 iterations"),
    (("SOLVER.FREEZE_LAST_LAYER_ITERS", 125000), "prototypes are never trained"),
    (("MODEL.TEACHER.TEMP_WARMUP_ITERS", 250000), r"temperature ends at 0\.055 instead of MODEL.TEACHER.TEMP 0\.07"),
    (("SOLVER.MIN_LR", 1.0), r"rises to its end: SOLVER.MIN_LR 1 is above the peak 0\.005657"),
    (("SOLVER.BASE_LR", 0.0), "LR is 0 throughout"),
    (("MODEL.TEACHER.MOMENTUM", 1.0, "MODEL.TEACHER.MOMENTUM_END", 0.9), "ever faster"),
    (("SOLVER.BACKBONE_FREEZE_ITERS", 125000), "backbone is never trained: SOLVER.BACKBONE_FREEZE_ITERS 125000"),
    (
        ("SOLVER.BACKBONE_FREEZE_ITERS", 124990, "SOLVER.BACKBONE_RAMP_ITERS", 100),
        r"BACKBONE_FREEZE_ITERS 124990 and BACKBONE_RAMP_ITERS 100 .*125000 end at 10\.0% of the LR",
    ),
]


@pytest.mark.parametrize("overrides, message", WARNINGS)
def test_schedules_that_cannot_be_meant_are_named(overrides: tuple[Any, ...], message: str) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(overrides)
    (warning,) = schedule_warnings(cfg, MODEL)
    assert re.search(message, warning), warning


@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.WARMUP_ITERS", 0, "SOLVER.FREEZE_LAST_LAYER_ITERS", 0, "MODEL.TEACHER.TEMP_WARMUP_ITERS", 0),
        ("SOLVER.WARMUP_ITERS", 1),
        ("SOLVER.FREEZE_LAST_LAYER_ITERS", 124999),
        ("MODEL.TEACHER.TEMP_WARMUP_ITERS", 125000),
        ("SOLVER.WARMUP_ITERS", 124990),
        ("SOLVER.MIN_LR", 0.0),
        ("SOLVER.BACKBONE_FREEZE_ITERS", 124900, "SOLVER.BACKBONE_RAMP_ITERS", 100),
    ],
)
def test_edges_that_work_have_no_warning(overrides: tuple[Any, ...]) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", "synthetic", *overrides])
    assert schedule_warnings(cfg, MODEL) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.WARMUP_ITERS", 125000),
        ("MODEL.TEACHER.TEMP_WARMUP_ITERS", 125001),
        ("SOLVER.FREEZE_LAST_LAYER_ITERS", 125000),
        ("SOLVER.BACKBONE_FREEZE_ITERS", 125000),
        ("MODEL.TEACHER.MOMENTUM", 1.0, "MODEL.TEACHER.MOMENTUM_END", 0.9),
    ],
)
def test_where_a_training_run_would_warn_the_report_does_too(overrides: tuple[Any, ...]) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", "synthetic", *overrides])
    assert len(validate(cfg)) == len(schedule_warnings(cfg, MODEL)) == 1


def test_a_classifier_has_no_teacher_and_no_prototypes() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.CLASSIFIER.NUM_CLASSES", 3, "SOLVER.MAX_ITER", 1000, "SOLVER.WARMUP_ITERS", 0])
    assert list(schedule_values(cfg, MODEL, [0])) == ["iteration", "lr", "last_layer_lr", "weight_decay"]
    assert schedule_warnings(cfg, MODEL) == []
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    assert len(schedule_warnings(cfg, MODEL)) == 2


def test_a_classifier_whose_backbone_hardly_trains_is_named() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.CLASSIFIER.NUM_CLASSES", 3, "SOLVER.MAX_ITER", 600, "SOLVER.WARMUP_ITERS", 0])
    cfg.merge_from_list(["SOLVER.BACKBONE_FREEZE_ITERS", 590, "SOLVER.BACKBONE_RAMP_ITERS", 100])
    (warning,) = schedule_warnings(cfg, MODEL)
    assert "end at 10.0% of the LR" in warning
