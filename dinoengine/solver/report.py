"""What the solver will do, before it does it: factors per layer, schedule values, and schedules that cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from dinoengine.config import CfgNode
from dinoengine.solver.build import build_lr_scheduler, build_optimizer, build_teacher_schedules, scaled_lr
from dinoengine.solver.param_groups import facts_of
from dinoengine.solver.schedules import RampAfterFreeze
from dinoengine.structures import ParamFacts

# An LR that has come down less far than this share of the way from its peak to MIN_LR did not finish its cosine. The last
# iteration of n in the cosine is at 1 - (pi / 2n)^2 of the way, so only cosines of fewer than 8 iterations are meant.
_COSINE_DONE = 0.95


class LayerRow(NamedTuple):
    """Parameters of one layer that share their factors.

    Attributes:
        layer: "patch embedding", "tokens and positions", "block 0" ..., "final norm", "outside the blocks" (heads; all of
            a model that states no layers), "prototypes".
        lr_mult, wd_mult: factors of learning rate and weight decay.
        num_params: numbers, not tensors.
    """

    layer: str
    lr_mult: float
    wd_mult: float
    num_params: int


def layer_table(cfg: CfgNode, model: nn.Module) -> list[LayerRow]:
    """The trainable parameters of ``model`` (it may be on the meta device) by layer and factors, from input to output."""
    counts: dict[tuple[float, str, float, float], int] = {}
    for group in build_optimizer(cfg, model).param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            facts = facts_of(model, name, parameter)
            depth = facts.layer_id if facts.num_layers >= 0 else math.inf
            key = (depth, _layer_name(facts), group["lr_mult"], -group["wd_mult"])
            counts[key] = counts.get(key, 0) + parameter.numel()
    return [LayerRow(layer, lr, -minus_wd, count) for (_, layer, lr, minus_wd), count in sorted(counts.items())]


def with_equal_blocks_together(rows: list[LayerRow]) -> list[LayerRow]:
    """The table with "blocks 0 to 23" for its blocks where all have the same factors (no layer decay), else as it is."""
    blocks = [row for row in rows if row.layer.startswith("block ")]
    names = list(dict.fromkeys(row.layer for row in blocks))
    kinds = list(dict.fromkeys((row.lr_mult, row.wd_mult) for row in blocks))
    if len(names) < 2 or len(blocks) != len(names) * len(kinds):
        return rows
    first, last = (names[i].removeprefix("block ") for i in (0, -1))
    together = [
        LayerRow(f"blocks {first} to {last}", *kind, sum(row.num_params for row in blocks if row[1:3] == kind))
        for kind in kinds
    ]
    place = rows.index(blocks[0])
    return [*rows[:place], *together, *(row for row in rows[place:] if row not in blocks)]


def _layer_name(facts: ParamFacts) -> str:
    if facts.role:
        return {"patch_embed": "patch embedding", "last_layer": "prototypes"}.get(facts.role, facts.role)
    if facts.num_layers < 0:
        return "outside the blocks"
    if facts.layer_id == 0:
        return "tokens and positions"
    return "final norm" if facts.layer_id > facts.num_layers else f"block {facts.layer_id - 1}"


def schedule_values(cfg: CfgNode, model: nn.Module, iterations: Iterable[int]) -> dict[str, list[float]]:
    """Every schedule of a run at some iterations: "iteration", then as logged: "lr", "last_layer_lr", ..., "teacher_temp".

    The values are those the training hooks set: ``build_lr_scheduler`` is applied to the model's optimizer.
    """
    scheduler = build_lr_scheduler(cfg, build_optimizer(cfg, model))
    teacher = build_teacher_schedules(cfg)
    columns: dict[str, list[float]] = {}
    for iteration in iterations:
        values = {"iteration": iteration, **scheduler.apply(iteration)}
        values |= {name: schedule(iteration) for name, schedule in teacher.items()}
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns


def turning_points(cfg: CfgNode) -> list[int]:
    """First and last iteration, quarters, and the ends of freeze and warm-ups: where schedules are worth a look."""
    solver, total = cfg.SOLVER, cfg.SOLVER.MAX_ITER
    ends = [solver.FREEZE_LAST_LAYER_ITERS, solver.WARMUP_ITERS, cfg.MODEL.TEACHER.TEMP_WARMUP_ITERS]
    if solver.BACKBONE_FREEZE_ITERS or solver.BACKBONE_RAMP_ITERS:
        ends += [solver.BACKBONE_FREEZE_ITERS, solver.BACKBONE_FREEZE_ITERS + solver.BACKBONE_RAMP_ITERS]
    points = [0, 1, *(end - 1 for end in ends), *ends, total // 4, total // 2, total * 3 // 4, total - 1]
    return sorted({point for point in points if 0 <= point < total})


def schedule_warnings(cfg: CfgNode, model: nn.Module) -> list[str]:
    """Schedules that run but can hardly be meant, each with the values it reaches; empty for a sound config."""
    solver, teacher = cfg.SOLVER, cfg.MODEL.TEACHER
    total = solver.MAX_ITER
    peak = scaled_lr(solver.BASE_LR, solver.IMS_PER_BATCH, solver.REFERENCE_BATCH_SIZE, solver.LR_SCALING)
    values = schedule_values(cfg, model, turning_points(cfg))
    highest, last = max(values["lr"]), values["lr"][-1]
    run = f"in a run of SOLVER.MAX_ITER {total}"
    warnings = []
    if peak == 0:
        warnings.append("The LR is 0 throughout: SOLVER.BASE_LR is 0.")
    elif peak < solver.MIN_LR:
        warnings.append(f"The LR rises to its end: SOLVER.MIN_LR {solver.MIN_LR:g} is above the peak {peak:.4g}.")
    elif highest < peak and not math.isclose(highest, peak):
        warnings.append(
            f"The LR never reaches its peak {peak:.4g}: SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} {run} ends at "
            f"{last:.4g}, {last / peak:.1%} of it, and the cosine after it is never begun."
        )
    elif peak - last < _COSINE_DONE * (peak - solver.MIN_LR):
        warnings.append(
            f"The LR ends at {last:.4g}, far from SOLVER.MIN_LR {solver.MIN_LR:g}: after SOLVER.WARMUP_ITERS "
            f"{solver.WARMUP_ITERS} only {total - solver.WARMUP_ITERS} iterations are left for the cosine."
        )
    freeze, ramp = solver.BACKBONE_FREEZE_ITERS, solver.BACKBONE_RAMP_ITERS
    if freeze >= total:
        warnings.append(f"The backbone is never trained: SOLVER.BACKBONE_FREEZE_ITERS {freeze} {run}.")
    elif freeze + ramp > total:
        share = RampAfterFreeze(freeze, ramp)(total - 1)
        warnings.append(
            f"The backbone hardly trains: SOLVER.BACKBONE_FREEZE_ITERS {freeze} and BACKBONE_RAMP_ITERS {ramp} {run} end "
            f"at {share:.1%} of the LR."
        )
    if cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        return warnings  # the others are about prototypes and teacher
    frozen = solver.FREEZE_LAST_LAYER_ITERS
    if frozen >= total:
        warnings.append(f"The prototypes are never trained: SOLVER.FREEZE_LAST_LAYER_ITERS {frozen} {run}.")
    last_temp = values["teacher_temp"][-1]
    if not math.isclose(last_temp, teacher.TEMP):
        warnings.append(
            f"The teacher temperature ends at {last_temp:.4g} instead of MODEL.TEACHER.TEMP {teacher.TEMP:g}: "
            f"MODEL.TEACHER.TEMP_WARMUP_ITERS {teacher.TEMP_WARMUP_ITERS} {run}."
        )
    if teacher.MOMENTUM > teacher.MOMENTUM_END:
        warnings.append(
            f"The teacher follows the student ever faster: MODEL.TEACHER.MOMENTUM {teacher.MOMENTUM:g} is above "
            f"MOMENTUM_END {teacher.MOMENTUM_END:g}."
        )
    return warnings
