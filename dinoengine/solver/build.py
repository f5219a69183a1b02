"""Optimizer and schedules from a config."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.solver.param_groups import param_groups
from dinoengine.solver.schedules import CosineSchedule, FrozenStart, LinearWarmupSchedule, RampAfterFreeze, Schedule
from dinoengine.utils.registry import Registry

logger = logging.getLogger(__name__)

OPTIMIZER_REGISTRY = Registry("OPTIMIZER")
OPTIMIZER_REGISTRY.__doc__ = """Name -> a function ``(cfg, groups) -> torch.optim.Optimizer``.

``groups`` come from ``param_groups``; the LR and weight decay of each are set before every step by OptimizerSchedule.
"""


@OPTIMIZER_REGISTRY.register("AdamW")
def build_adamw(cfg: CfgNode, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) with SOLVER.BETAS and SOLVER.EPS; torch's fused kernel, one pass over the weights."""
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.SOLVER.BETAS, eps=cfg.SOLVER.EPS, weight_decay=0.0, fused=True)


@OPTIMIZER_REGISTRY.register("SGD")
def build_sgd(cfg: CfgNode, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD with SOLVER.MOMENTUM, without Nesterov's term: the optimizer of DINOv2's linear evaluation."""
    return torch.optim.SGD(groups, lr=0.0, momentum=cfg.SOLVER.MOMENTUM, weight_decay=0.0)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer SOLVER.OPTIMIZER over the trainable parameters of ``model`` (not its DDP wrapper)."""
    groups = param_groups(model, layer_decay=cfg.SOLVER.LAYER_DECAY, patch_embed_lr_mult=cfg.SOLVER.PATCH_EMBED_LR_MULT)
    optimizer: torch.optim.Optimizer = OPTIMIZER_REGISTRY.get(cfg.SOLVER.OPTIMIZER)(cfg, groups)
    return optimizer


def scaled_lr(base_lr: float, batch_size: int, reference_batch_size: int, rule: str) -> float:
    """Peak learning rate for a global batch size.

    Args:
        rule: "sqrt", "linear" or "none".

    Raises:
        ValueError: for another rule.
    """
    ratio = batch_size / reference_batch_size
    factors = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}
    if rule not in factors:
        raise ValueError(f"SOLVER.LR_SCALING must be one of {', '.join(factors)}; got {rule!r}.")
    return base_lr * factors[rule]


class OptimizerSchedule:
    """Sets LR and weight decay of every parameter group as a function of the iteration.

    group LR = (last-layer LR, or LR, times the backbone's factor in the backbone) * lr_mult, group weight decay = weight
    decay * wd_mult. It has no state: the iteration says everything, so a resumed run needs nothing from a checkpoint.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Schedule,
        weight_decay: Schedule,
        last_layer_lr: Schedule,
        backbone_factor: Schedule | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.last_layer_lr = last_layer_lr
        self.backbone_factor = backbone_factor

    def apply(self, iteration: int) -> dict[str, float]:
        """Set the values of ``iteration`` and return them by name, for logging."""
        lr, last_layer_lr = self.lr(iteration), self.last_layer_lr(iteration)
        weight_decay = self.weight_decay(iteration)
        backbone_lr = lr * (self.backbone_factor(iteration) if self.backbone_factor else 1.0)
        for group in self.optimizer.param_groups:
            group_lr = last_layer_lr if group.get("is_last_layer") else backbone_lr if group.get("in_backbone") else lr
            group["lr"] = group_lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
        values = {"lr": lr, "last_layer_lr": last_layer_lr, "weight_decay": weight_decay}
        return values | ({"backbone_lr": backbone_lr} if self.backbone_factor else {})

    def get_last_lr(self) -> list[float]:
        """The LR each group has now."""
        return [group["lr"] for group in self.optimizer.param_groups]


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> OptimizerSchedule:
    """LR, last-layer LR, weight decay and backbone factor of SOLVER."""
    solver = cfg.SOLVER
    is_held_back = solver.BACKBONE_FREEZE_ITERS > 0 or solver.BACKBONE_RAMP_ITERS > 0
    peak = scaled_lr(solver.BASE_LR, solver.IMS_PER_BATCH, solver.REFERENCE_BATCH_SIZE, solver.LR_SCALING)
    lr = CosineSchedule(peak, solver.MIN_LR, solver.MAX_ITER, warmup_iters=solver.WARMUP_ITERS)
    return OptimizerSchedule(
        optimizer,
        lr=lr,
        last_layer_lr=FrozenStart(lr, solver.FREEZE_LAST_LAYER_ITERS),
        weight_decay=CosineSchedule(solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_END, solver.MAX_ITER),
        backbone_factor=RampAfterFreeze(solver.BACKBONE_FREEZE_ITERS, solver.BACKBONE_RAMP_ITERS)
        if is_held_back
        else None,
    )


def build_teacher_schedules(cfg: CfgNode) -> dict[str, Schedule]:
    """The schedules of MODEL.TEACHER: "teacher_momentum" and "teacher_temp"; a classifier has no teacher and none."""
    if cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        return {}
    teacher = cfg.MODEL.TEACHER
    return {
        "teacher_momentum": CosineSchedule(teacher.MOMENTUM, teacher.MOMENTUM_END, cfg.SOLVER.MAX_ITER),
        "teacher_temp": LinearWarmupSchedule(teacher.WARMUP_TEMP, teacher.TEMP, teacher.TEMP_WARMUP_ITERS),
    }


_ITERATION_KEYS = (
    "SOLVER.MAX_ITER",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.FREEZE_LAST_LAYER_ITERS",
    "SOLVER.BACKBONE_FREEZE_ITERS",
    "SOLVER.BACKBONE_RAMP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_KEEP_EVERY",
    "MODEL.TEACHER.TEMP_WARMUP_ITERS",
    "TEST.EVAL_PERIOD",
)


def scale_config_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """detectron2's ``auto_scale_workers``: keep the batch per process and the number of images seen.

    With s = world size / SOLVER.REFERENCE_WORLD_SIZE the global batch is multiplied by s and every count of iterations
    divided by it. BASE_LR is multiplied by s only where LR_SCALING is "none": the other rules follow the batch.

    Returns:
        ``cfg`` itself if REFERENCE_WORLD_SIZE is 0 or the world size, else a scaled copy (frozen if ``cfg`` is).

    Raises:
        ValueError: if the batch is not divisible by REFERENCE_WORLD_SIZE.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not divisible by SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}, so there is no batch per process to keep."
        )
    scaled = cfg.clone()
    scaled.defrost()
    factor = world_size / reference
    scaled.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH // reference * world_size
    if cfg.SOLVER.LR_SCALING == "none":
        scaled.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR * factor
    for key in _ITERATION_KEYS:
        *groups, leaf = key.split(".")
        node = scaled
        for group in groups:
            node = node[group]
        if node[leaf] > 0:  # 0 means "off" for some and must not appear by rounding
            node[leaf] = max(1, round(node[leaf] / factor))
    scaled.SOLVER.REFERENCE_WORLD_SIZE = world_size
    logger.info(
        "Recipe made for %d processes, running on %d: batch %d -> %d, MAX_ITER %d -> %d, BASE_LR %g -> %g.",
        reference,
        world_size,
        cfg.SOLVER.IMS_PER_BATCH,
        scaled.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.MAX_ITER,
        scaled.SOLVER.MAX_ITER,
        cfg.SOLVER.BASE_LR,
        scaled.SOLVER.BASE_LR,
    )
    if cfg.is_frozen():
        scaled.freeze()
    return scaled
