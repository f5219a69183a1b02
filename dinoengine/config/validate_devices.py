"""Checks of keys about devices and how processes share a model; ``validate`` runs them."""

from __future__ import annotations

from collections.abc import Iterator

from dinoengine.config.config import CfgNode


def check_device(cfg: CfgNode) -> Iterator[str]:
    """What the device of the run cannot do."""
    if cfg.MODEL.ATTENTION in ("varlen", "xformers") and cfg.MODEL.DEVICE == "cpu":
        yield f"MODEL.ATTENTION {cfg.MODEL.ATTENTION} needs CUDA, but the device is the CPU; use auto or sdpa."
    if cfg.MODEL.COMPILE and cfg.MODEL.ACTIVATION_CHECKPOINTING == "selective":
        yield (
            "MODEL.COMPILE chooses itself what it computes again within a block; with it MODEL.ACTIVATION_CHECKPOINTING is "
            "none or full, not selective."
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "fp16" and cfg.MODEL.DEVICE == "cpu":
        yield "SOLVER.AMP.PRECISION fp16 needs CUDA, but the device is the CPU; use bf16, or SOLVER.AMP.ENABLED False."


def check_sharding_groups(cfg: CfgNode, world_size: int) -> Iterator[str]:
    """Whether ``world_size`` processes can be split into groups that have a copy of the model each."""
    size = cfg.MODEL.FSDP.GROUP_SIZE
    if cfg.MODEL.PARALLEL == "fsdp" and size > 1 and world_size > 1 and world_size % size:
        possible = [str(n) for n in range(2, world_size + 1) if world_size % n == 0]
        yield (
            f"MODEL.FSDP.GROUP_SIZE {size} does not divide {world_size} processes; possible: {', '.join(possible)}, "
            "or 0 for all of them."
        )


def check_sharding(cfg: CfgNode) -> Iterator[str]:
    """What a model that is split among processes cannot do, and what only such a one can."""
    if cfg.MODEL.FSDP.GROUP_SIZE == 1:
        yield "MODEL.FSDP.GROUP_SIZE 1 splits nothing; use MODEL.PARALLEL ddp, or 0 (all processes), or 2 or more."
    if cfg.MODEL.PARALLEL != "fsdp":
        if cfg.MODEL.FSDP.GROUP_SIZE > 1:
            yield "MODEL.FSDP.GROUP_SIZE is of MODEL.PARALLEL fsdp alone."
        return
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "fp16":
        yield "SOLVER.AMP.PRECISION fp16 is not possible with MODEL.PARALLEL fsdp; use bf16, which needs no scaler."
    if cfg.SOLVER.CHECKPOINT_IN_BACKGROUND:
        yield "SOLVER.CHECKPOINT_IN_BACKGROUND is not possible with MODEL.PARALLEL fsdp: all processes write together."
    if cfg.MODEL.DDP.FP16_COMPRESSION:
        yield "MODEL.DDP.FP16_COMPRESSION is of MODEL.PARALLEL ddp alone."
    if cfg.TEST.PRECISE_BN.ENABLED:
        yield "TEST.PRECISE_BN.ENABLED is not possible with MODEL.PARALLEL fsdp, whose evaluations see a copy of the model."
