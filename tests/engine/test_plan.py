"""A plan: sums that can be done by hand, and the published runs."""

from __future__ import annotations

import pytest

from dinoengine.config import CfgNode, read_cfg
from dinoengine.engine.plan import make_plan, render

SHORT = "configs/dinov2/vitl16_short.yaml"


def test_the_published_short_recipe() -> None:
    plan = make_plan(read_cfg(SHORT), 32, 1_281_167)
    assert plan.parameters.parts["backbone"] == 303_351_808
    # The published step has 1.15e12; ours runs the last block on the tokens that are needed.
    assert plan.flops_per_image == pytest.approx(1.12e12, rel=0.01)
    assert plan.images_seen == 2048 * 125_000
    assert plan.hours(92.6) == pytest.approx(24.0, abs=0.1)  # published: about a day
    # The optimizer's two moments, student and teacher, in fp32.
    assert plan.checkpoint_bytes == 4 * 4 * 327_014_656
    assert plan.num_checkpoints == 3 + 1 + 1
    text = render(plan, images_per_second=92.6)
    assert "199.8 passes over 1,281,167" in text
    assert "24.0 at 92.6 images/s per GPU (768 GPU hours)" in text


def test_memory_and_traffic_of_ddp_and_fsdp(tiny_cfg: CfgNode) -> None:
    plan = make_plan(tiny_cfg, 4)
    ddp, fsdp = plan.memory["ddp"], plan.memory["fsdp"]
    trained, everything = plan.parameters.trained, plan.parameters.trained + plan.parameters.teacher
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (4 * everything, 4 * trained, 8 * trained)
    for part in ("weights", "gradients", "optimizer"):
        assert fsdp[part] == ddp[part] / 4
    assert plan.traffic["ddp"]["gradients"] == 2 * 3 / 4 * 4 * trained
    assert plan.traffic["fsdp"]["gradients"] == 3 / 4 * 4 * trained
    assert plan.total_memory("ddp") == sum(ddp.values())


def test_groups_hold_more_and_send_less(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.PARALLEL = "fsdp"
    one = make_plan(tiny_cfg, 4)
    tiny_cfg.MODEL.FSDP.GROUP_SIZE = 2
    two = make_plan(tiny_cfg, 4)
    trained = one.parameters.trained
    for part in ("weights", "gradients", "optimizer"):
        assert two.memory["fsdp"][part] == 2 * one.memory["fsdp"][part]
    assert two.traffic["fsdp"]["weights"] == pytest.approx((1 / 2) / (3 / 4) * one.traffic["fsdp"]["weights"])
    # Half of it scattered within the group; of the share, half of them, both groups send half and get half.
    assert two.traffic["fsdp"]["gradients"] == pytest.approx((1 / 2 + 1 / 2) * 4 * trained)
    assert two.memory["ddp"] == one.memory["ddp"]


def test_activation_checkpointing_needs_less_memory_and_more_operations(tiny_cfg: CfgNode) -> None:
    plans = {}
    for mode in ("none", "selective", "full"):
        tiny_cfg.merge_from_list(["MODEL.ACTIVATION_CHECKPOINTING", mode, "MODEL.VIT.DEPTH", 6])
        plans[mode] = make_plan(tiny_cfg, 2)
    kept = {mode: plan.memory["ddp"]["activations: backbone"] for mode, plan in plans.items()}
    assert kept["full"] < 0.5 * kept["selective"] < 0.5 * kept["none"]
    assert plans["selective"].recomputed_flops == plans["none"].recomputed_flops == 0
    # A third of what the student computes, which is not all of the step.
    assert 0.2 < plans["full"].recomputed_flops / plans["full"].flops_per_image < 1 / 3
    assert "computed again" in render(plans["full"])
    assert "computed again" not in render(plans["selective"])


def test_a_precision_that_is_fp32_is_planned_as_fp32(tiny_cfg: CfgNode) -> None:
    plain = make_plan(tiny_cfg, 2)
    tiny_cfg.merge_from_list(["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp32"])
    assert make_plan(tiny_cfg, 2).memory == plain.memory
    tiny_cfg.merge_from_list(["SOLVER.AMP.PRECISION", "bf16"])
    assert make_plan(tiny_cfg, 2).memory != plain.memory


def test_one_process_has_nothing_to_share(tiny_cfg: CfgNode) -> None:
    plan = make_plan(tiny_cfg, 1)
    assert plan.memory["ddp"] == plan.memory["fsdp"]
    assert "sent by a GPU" not in render(plan)


def test_a_tenth_of_the_memory_is_not_for_the_step(tiny_cfg: CfgNode) -> None:
    plan = make_plan(tiny_cfg, 1)
    gib = plan.total_memory("ddp") / 2**30
    assert "A step needs" not in render(plan, gpu_memory_gib=1.12 * gib)
    assert "GiB with ddp and" in render(plan, gpu_memory_gib=1.1 * gib)


def test_what_is_unwise_is_said(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.DINO_HEAD.NUM_PROTOTYPES = 4096
    tiny_cfg.MODEL.LOSS.CENTERING = "sinkhorn_knopp"
    text = render(make_plan(tiny_cfg, 2), gpu_memory_gib=1e-6)
    assert "more than the 24 images of the training set" in text
    assert "Sinkhorn-Knopp spreads 8 rows" in text
    assert (
        " GiB with fsdp; of the 1e-06 GiB of a GPU a tenth is for what is not counted here. MODEL.ACTIVATION_CHECK"
        in text
    )
    tiny_cfg.SOLVER.IMS_PER_BATCH = 48
    assert "more than one pass" in render(make_plan(tiny_cfg, 2))


def test_data_that_is_not_at_hand_is_no_obstacle(tiny_cfg: CfgNode) -> None:
    tiny_cfg.DATASETS.TRAIN = ("folder:/nowhere",)
    assert "--dataset-size gives its passes" in render(make_plan(tiny_cfg, 2))
    assert "0.4 passes over 100" in render(make_plan(tiny_cfg, 2, 100))


def test_what_cannot_be_planned(tiny_cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match="--num-gpus must be 1 or more, got 0"):
        make_plan(tiny_cfg, 0)
    with pytest.raises(ValueError, match="divisible"):
        make_plan(tiny_cfg, 3)
