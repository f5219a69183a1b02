from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.config import CfgNode, get_cfg
from dinoengine.modeling import build_model
from dinoengine.solver import (
    OPTIMIZER_REGISTRY,
    OptimizerSchedule,
    build_lr_scheduler,
    build_optimizer,
    param_groups,
    scaled_lr,
)
from dinoengine.structures import ParamFacts

MICRO = [
    "MODEL.VIT.SIZE=micro",
    "MODEL.VIT.PATCH_SIZE_PX=8",
    "INPUT.GLOBAL_CROPS.SIZE_PX=16",
    "INPUT.LOCAL_CROPS.SIZE_PX=8",
    "MODEL.DINO_HEAD.NUM_PROTOTYPES=7",
    "MODEL.DINO_HEAD.HIDDEN_DIM=6",
    "MODEL.DINO_HEAD.BOTTLENECK_DIM=5",
    "MODEL.IBOT_HEAD.NUM_PROTOTYPES=7",
    "MODEL.IBOT_HEAD.HIDDEN_DIM=6",
    "MODEL.IBOT_HEAD.BOTTLENECK_DIM=5",
]


class ThreeRoles(nn.Module):
    """A decayed, a spared and a last-layer parameter; layer decay reaches the first only."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.ones(2))
        self.spared = nn.Parameter(torch.ones(2))
        self.last = nn.Parameter(torch.ones(2))

    def param_facts(self, name: str) -> ParamFacts:
        return {
            "plain": ParamFacts(layer_id=1, num_layers=1),
            "spared": ParamFacts(layer_id=2, num_layers=1, weight_decay=False),
            "last": ParamFacts(role="last_layer"),
        }[name]


def _cfg(*overrides: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(overrides)
    return cfg


def _three_roles(cfg: CfgNode) -> tuple[ThreeRoles, torch.optim.Optimizer, OptimizerSchedule]:
    model = ThreeRoles()
    optimizer = build_optimizer(cfg, model)
    return model, optimizer, build_lr_scheduler(cfg, optimizer)


# --- learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, batch, expected",
    [
        ("sqrt", 2048, 4e-3 * math.sqrt(2)),
        ("sqrt", 256, 2e-3),
        ("linear", 2048, 8e-3),
        ("linear", 256, 1e-3),
        ("none", 17, 4e-3),
        ("sqrt", 1024, 4e-3),
        ("linear", 1024, 4e-3),
    ],
)
def test_scaled_lr(rule: str, batch: int, expected: float) -> None:
    assert scaled_lr(4e-3, batch, 1024, rule) == pytest.approx(expected, rel=1e-12)


def test_scaled_lr_refuses_another_rule() -> None:
    with pytest.raises(ValueError, match=r"SOLVER.LR_SCALING must be one of sqrt, linear, none; got 'cubic'"):
        scaled_lr(1.0, 2, 1, "cubic")


def test_peak_lr_follows_the_configured_rule_and_min_lr_does_not_scale() -> None:
    for rule, peak in {"sqrt": 0.2, "linear": 0.4, "none": 0.1}.items():
        cfg = _cfg("SOLVER.BASE_LR=0.1", "SOLVER.IMS_PER_BATCH=64", "SOLVER.REFERENCE_BATCH_SIZE=16")
        cfg.merge_from_list(
            [f"SOLVER.LR_SCALING={rule}", "SOLVER.WARMUP_ITERS=3", "SOLVER.MAX_ITER=9", "SOLVER.MIN_LR=1e-3"]
        )
        schedule = build_lr_scheduler(cfg, optimizer=None)  # type: ignore[arg-type]
        assert schedule.lr(2) == schedule.lr(3) == pytest.approx(peak, rel=1e-12)
        assert schedule.lr(9) == 1e-3


# --- the optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["MODEL.IBOT_HEAD.SEPARATE=True"], ["MODEL.LOSS.IBOT_WEIGHT=0"]])
def test_optimizer_holds_exactly_the_trainable_parameters_of_the_student(overrides: list[str]) -> None:
    model = build_model(_cfg(*MICRO, *overrides))
    optimizer = build_optimizer(_cfg(*MICRO, *overrides), model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(held) == len(trainable)
    assert {id(p) for p in held} == {id(p) for p in trainable.values()}
    assert all(name.startswith("student.") for name in trainable)


def test_groups_of_the_whole_method() -> None:
    model = build_model(_cfg(*MICRO, "MODEL.IBOT_HEAD.SEPARATE=True"))
    groups = param_groups(model, layer_decay=0.9, patch_embed_lr_mult=0.2)
    # tokens and table; patch embedding (weight, bias); 4 blocks (decayed, spared); final norm; heads (both); prototypes
    assert len(groups) == 1 + 2 + 2 * 4 + 1 + 2 + 1
    last = [name for g in groups if g["is_last_layer"] for name in g["param_names"]]
    assert sorted(last) == [f"student.{h}.last_layer.weight_{p}" for h in ("dino_head", "ibot_head") for p in "gv"]


def test_adamw_takes_its_betas_and_eps_from_the_config() -> None:
    _, optimizer, _ = _three_roles(_cfg("SOLVER.BETAS=(0.8, 0.95)", "SOLVER.EPS=1e-6"))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.95)
        assert group["eps"] == 1e-6


def test_the_fused_adamw_equals_the_plain_one() -> None:
    def trained(**options: Any) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 7), (3,), (65,))]
        optimizer = OPTIMIZER_REGISTRY.get("AdamW")(get_cfg(), [{"params": weights}])
        assert optimizer.defaults["fused"]
        optimizer.defaults.update(options)
        for group in optimizer.param_groups:
            group.update(lr=0.1, weight_decay=0.2, **options)
        for _ in range(5):
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return weights

    plain = trained(fused=False, foreach=False)
    for got, expected in zip(trained(), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_layer_decay_and_patch_embed_multiplier_come_from_the_config() -> None:
    cfg = _cfg(*MICRO, "SOLVER.LAYER_DECAY=0.5", "SOLVER.PATCH_EMBED_LR_MULT=0.25")
    multipliers = {
        name: group["lr_mult"]
        for group in build_optimizer(cfg, build_model(cfg)).param_groups
        for name in group["param_names"]
    }
    assert multipliers["student.backbone.cls_token"] == 0.5**5  # micro has 4 blocks
    assert multipliers["student.backbone.patch_embed.proj.weight"] == 0.25 * 0.5**5
    assert multipliers["student.backbone.blocks.3.norm1.weight"] == 0.5
    assert multipliers["student.backbone.norm.weight"] == 1.0
    assert multipliers["student.dino_head.mlp.0.weight"] == 1.0


def test_unknown_optimizer_lists_the_known() -> None:
    with pytest.raises(KeyError, match=r"No 'AdamV' in the OPTIMIZER registry \(did you mean 'AdamW'\?\)"):
        build_optimizer(_cfg("SOLVER.OPTIMIZER=AdamV"), ThreeRoles())


def test_sgd_with_momentum_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    start = model.weight.item()
    optimizer = build_optimizer(_cfg("SOLVER.OPTIMIZER=SGD", "SOLVER.MOMENTUM=0.5"), model)
    optimizer.param_groups[0]["lr"] = 0.1
    for gradient in (2.0, 4.0):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    assert model.weight.item() == pytest.approx(start - 0.1 * 2 - 0.1 * (4 + 0.5 * 2))


def test_linear_evaluation_scales_the_lr_by_batch_over_256_and_ends_at_0() -> None:
    cfg = _cfg("SOLVER.BASE_LR=0.1", "SOLVER.LR_SCALING=linear", "SOLVER.REFERENCE_BATCH_SIZE=256", "SOLVER.MIN_LR=0")
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 1024, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 12500])
    scheduler = build_lr_scheduler(cfg, build_optimizer(cfg, torch.nn.Linear(1, 1)))
    values = [scheduler.apply(i)["lr"] for i in (0, 6250, 12500)]
    assert values == [pytest.approx(0.4), pytest.approx(0.2), 0.0]


def test_a_registered_optimizer_is_built_from_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZER_REGISTRY._obj_map, "MySGD", lambda cfg, groups: torch.optim.SGD(groups, lr=0.0))
    optimizer = build_optimizer(_cfg("SOLVER.OPTIMIZER=MySGD"), ThreeRoles())
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["param_names"] for group in optimizer.param_groups] == [["plain"], ["spared"], ["last"]]


# --- LR and weight decay of the groups ---------------------------------------------------------------------------

TOY = [
    "SOLVER.BASE_LR=0.1",
    "SOLVER.LR_SCALING=none",
    "SOLVER.MIN_LR=0.01",
    "SOLVER.MAX_ITER=20",
    "SOLVER.WARMUP_ITERS=5",
    "SOLVER.FREEZE_LAST_LAYER_ITERS=8",
    "SOLVER.WEIGHT_DECAY=0.2",
    "SOLVER.WEIGHT_DECAY_END=0.4",
    "SOLVER.LAYER_DECAY=0.5",
]


@pytest.mark.parametrize("iteration", [0, 1, 4, 7, 8, 13, 20, 99])
def test_every_group_gets_its_share_of_the_schedules(iteration: int) -> None:
    _, optimizer, schedule = _three_roles(_cfg(*TOY))
    values = schedule.apply(iteration)
    assert values == {
        "lr": schedule.lr(iteration),
        "last_layer_lr": schedule.last_layer_lr(iteration),
        "weight_decay": schedule.weight_decay(iteration),
    }
    by_name = {group["param_names"][0]: group for group in optimizer.param_groups}
    assert by_name["plain"]["lr"] == pytest.approx(0.5 * values["lr"])
    assert by_name["spared"]["lr"] == values["lr"]
    assert by_name["last"]["lr"] == values["last_layer_lr"]
    assert by_name["plain"]["weight_decay"] == by_name["last"]["weight_decay"] == values["weight_decay"]
    assert by_name["spared"]["weight_decay"] == 0.0
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_hand_computed_values_of_a_toy_schedule() -> None:
    _, _, schedule = _three_roles(_cfg(*TOY))
    assert schedule.apply(0) == {"lr": 0.0, "last_layer_lr": 0.0, "weight_decay": 0.2}
    assert schedule.apply(2) == {
        "lr": pytest.approx(0.05),
        "last_layer_lr": 0.0,
        "weight_decay": pytest.approx(0.3 - 0.1 * math.cos(math.pi * 2 / 20)),
    }
    assert schedule.apply(10) == {
        "lr": pytest.approx(0.055 + 0.045 * math.cos(math.pi * 5 / 15)),
        "last_layer_lr": pytest.approx(0.055 + 0.045 * math.cos(math.pi * 5 / 15)),
        "weight_decay": pytest.approx(0.3),
    }
    assert schedule.apply(20) == {"lr": 0.01, "last_layer_lr": 0.01, "weight_decay": 0.4}


def test_groups_without_multipliers_get_the_plain_values() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "lr_mult": 3.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = OptimizerSchedule(
        optimizer, lr=lambda i: 0.1 * i, weight_decay=lambda i: 0.5, last_layer_lr=lambda i: 7.0
    )
    schedule.apply(2)
    assert schedule.get_last_lr() == pytest.approx([0.2, 0.6])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_weight_decay_and_freezing_as_the_weights_feel_them() -> None:
    model, optimizer, schedule = _three_roles(_cfg(*TOY, "SOLVER.LAYER_DECAY=1.0"))
    values = schedule.apply(7)  # the last frozen iteration
    for parameter in (model.plain, model.spared):
        parameter.grad = torch.zeros(2)  # Adam's own step is then 0, decay alone remains
    model.last.grad = torch.full((2,), 0.5)
    optimizer.step()
    torch.testing.assert_close(model.plain.data, torch.full((2,), 1.0 - values["lr"] * values["weight_decay"]))
    assert torch.equal(model.spared.data, torch.ones(2))
    assert torch.equal(model.last.data, torch.ones(2))
    # Frozen by LR 0, as published: Adam's moments build up meanwhile, and the weights move when it ends.
    assert optimizer.state[model.last]["exp_avg"].abs().min() > 0
    schedule.apply(8)
    optimizer.step()
    assert (model.last.data < 1.0).all()


def test_the_order_of_calls_does_not_matter_so_resume_needs_nothing() -> None:
    _, straight_optimizer, straight = _three_roles(_cfg(*TOY))
    for iteration in range(12):
        straight.apply(iteration)
    _, resumed_optimizer, resumed = _three_roles(_cfg(*TOY))
    resumed.apply(19)
    assert resumed.apply(11) == straight.apply(11)
    assert resumed.get_last_lr() == straight.get_last_lr()
    decays = [[g["weight_decay"] for g in o.param_groups] for o in (straight_optimizer, resumed_optimizer)]
    assert decays[0] == decays[1]
    assert not hasattr(resumed, "state_dict")


def test_the_config_decides_after_a_resume_not_the_checkpoint() -> None:
    _, old_optimizer, old = _three_roles(_cfg(*TOY))
    old.apply(10)
    _, optimizer, schedule = _three_roles(_cfg(*TOY, "SOLVER.BASE_LR=0.3", "SOLVER.MAX_ITER=40"))
    optimizer.load_state_dict(old_optimizer.state_dict())
    schedule.apply(10)
    expected = 0.155 + 0.145 * math.cos(math.pi * 5 / 35)  # the new peak and the new length
    assert schedule.get_last_lr() == pytest.approx([0.5 * expected, expected, expected])


def test_a_frozen_backbone_has_lr_0_then_rises_to_the_schedule() -> None:
    cfg = _cfg(*MICRO, "SOLVER.BACKBONE_FREEZE_ITERS=3", "SOLVER.BACKBONE_RAMP_ITERS=4", "SOLVER.WARMUP_ITERS=0")
    optimizer = build_optimizer(cfg, build_model(cfg))
    scheduler = build_lr_scheduler(cfg, optimizer)
    factors = []
    for iteration in range(9):
        values = scheduler.apply(iteration)
        for group in optimizer.param_groups:
            base = values["last_layer_lr"] if group["is_last_layer"] else values["lr"]
            expected = values["backbone_lr"] if group["in_backbone"] else base
            assert group["lr"] == expected * group["lr_mult"]
            assert group["in_backbone"] == all(n.startswith("student.backbone.") for n in group["param_names"])
        factors.append(values["backbone_lr"] / values["lr"])
    assert factors == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert "backbone_lr" not in build_lr_scheduler(_cfg(*MICRO), optimizer).apply(0)
