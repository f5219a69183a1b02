"""What devices and sharded models can do, as a config says it."""

from __future__ import annotations

import pytest

from dinoengine.config import CfgNode, ConfigError, validate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16"], "fp16 is not possible with MODEL.PARALLEL fsdp"),
        (["SOLVER.CHECKPOINT_IN_BACKGROUND", True], "all processes write together"),
        (["MODEL.DDP.FP16_COMPRESSION", True], "of MODEL.PARALLEL ddp alone"),
        (["TEST.PRECISE_BN.ENABLED", True], "TEST.PRECISE_BN.ENABLED is not possible"),
    ],
)
def test_what_a_sharded_model_cannot_do(tiny_cfg: CfgNode, changes: list[object], message: str) -> None:
    tiny_cfg.MODEL.PARALLEL = "fsdp"
    validate(tiny_cfg, 2)
    tiny_cfg.merge_from_list(changes)
    with pytest.raises(ConfigError, match=message):
        validate(tiny_cfg, 2)


def test_groups_that_share_a_model(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["MODEL.PARALLEL", "fsdp", "MODEL.FSDP.GROUP_SIZE", 2])
    validate(tiny_cfg, 4)
    validate(tiny_cfg, 1)  # one process has the whole model, whatever the groups
    tiny_cfg.SOLVER.IMS_PER_BATCH = 12
    tiny_cfg.MODEL.FSDP.GROUP_SIZE = 4
    with pytest.raises(ConfigError, match="GROUP_SIZE 4 does not divide 6 processes; possible: 2, 3, 6, or 0 for all"):
        validate(tiny_cfg, 6)


@pytest.mark.parametrize(
    ("parallel", "size", "message"),
    [
        ("fsdp", 1, "GROUP_SIZE 1 splits nothing"),
        ("ddp", 2, "GROUP_SIZE is of MODEL.PARALLEL fsdp alone"),
        ("fsdp", -2, "MODEL.FSDP.GROUP_SIZE"),
    ],
)
def test_groups_that_make_no_sense(tiny_cfg: CfgNode, parallel: str, size: int, message: str) -> None:
    tiny_cfg.merge_from_list(["MODEL.PARALLEL", parallel, "MODEL.FSDP.GROUP_SIZE", size])
    with pytest.raises(ConfigError, match=message):
        validate(tiny_cfg, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["SOLVER.AMP.PRECISION", "auto"], "PRECISION auto measures nothing: SOLVER.AMP.ENABLED is False"),
        (["MODEL.COMPILE", True, "MODEL.PARALLEL", "fsdp"], "each block is compiled in pieces"),
    ],
)
def test_what_has_little_effect_is_said(tiny_cfg: CfgNode, changes: list[object], message: str) -> None:
    assert not any(message in warning for warning in validate(tiny_cfg, 2))
    tiny_cfg.merge_from_list(changes)
    assert any(message in warning for warning in validate(tiny_cfg, 2))
