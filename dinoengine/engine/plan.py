"""What a run will take before it is started: memory, traffic, disk, hours (``tools/plan.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn

from dinoengine.config import CfgNode, validate
from dinoengine.data import build_dataset
from dinoengine.engine.sharding import ShardingUnit, sharding_units
from dinoengine.engine.workload import (
    Workload,
    activation_bytes,
    recomputed_flops,
    require_known_parts,
    step_flops,
    workspace_bytes,
)
from dinoengine.modeling import build_model
from dinoengine.modeling.backbone.vit import VisionTransformer
from dinoengine.modeling.heads.dino_head import DINOHead
from dinoengine.modeling.meta_arch.dinov2 import DINOv2
from dinoengine.solver import scale_config_to_world_size
from dinoengine.solver.report import schedule_warnings

STRATEGIES = ("ddp", "fsdp")
_GIB = 2**30
# Moments and the like for each trained parameter, in fp32.
_STATES = {"AdamW": 2, "SGD": 1}
# The next unit is gathered while one is computed.
_UNITS_IN_FLIGHT = 2
# Of a GPU's memory: the rest goes to the CUDA context, libraries and fragments.
_USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of each part of the student, of all that is trained, of the teacher (its heads as well)."""

    parts: dict[str, int]
    trained: int
    teacher: int


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        memory: strategy -> part -> bytes on one GPU.
        traffic: strategy -> what is exchanged -> bytes that each GPU sends in a step.
        flops_per_image: of the training step, attention included; activation checkpointing computes ``recomputed_flops`` of
            them again.
        num_images: of the training set; None where the data is not at hand.
        checkpoint_bytes: of one checkpoint; ``num_checkpoints`` of them lie on disk at most.
        warnings: settings that work but can hardly be meant.
    """

    parameters: Parameters
    work: Workload
    num_processes: int
    batch: int
    num_iters: int
    memory: dict[str, dict[str, float]]
    traffic: dict[str, dict[str, float]]
    flops_per_image: float
    recomputed_flops: float
    num_images: int | None
    checkpoint_bytes: int
    num_checkpoints: int
    warnings: list[str]

    @property
    def images_seen(self) -> int:
        return self.batch * self.num_iters

    def total_memory(self, strategy: str) -> float:
        return sum(self.memory[strategy].values())

    def hours(self, images_per_second: float) -> float:
        """Of training alone, at this number of images a second on each GPU."""
        return self.images_seen / (images_per_second * self.num_processes) / 3600


def make_plan(cfg: CfgNode, num_processes: int, num_images: int = 0) -> Plan:
    """
    Args:
        num_processes: GPUs of the run.
        num_images: of the training set; 0 asks DATASETS.TRAIN.

    Raises:
        ConfigError, ValueError: if the config cannot be run on so many processes, or has a model of unknown parts.
    """
    if num_processes < 1:
        raise ValueError(f"--num-gpus must be 1 or more, got {num_processes}.")
    cfg = scale_config_to_world_size(cfg, num_processes)
    warnings = validate(cfg, num_processes)
    if cfg.SOLVER.OPTIMIZER not in _STATES:
        raise ValueError(
            f"A plan knows the optimizers {', '.join(_STATES)}; got SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER}."
        )
    with torch.device("meta"):
        model = require_known_parts(build_model(cfg))
    work = Workload.of(cfg, num_processes)
    parts = {name: _numel(part) for name, part in model.student.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = Parameters(parts, trained, _numel(model.teacher))
    size = num_images or _size_of_training_set(cfg)
    saved = 4 * (sum(parts.values()) + parameters.teacher + _STATES[cfg.SOLVER.OPTIMIZER] * trained)
    return Plan(
        parameters=parameters,
        work=work,
        num_processes=num_processes,
        batch=cfg.SOLVER.IMS_PER_BATCH,
        num_iters=cfg.SOLVER.MAX_ITER,
        memory={strategy: _memory(cfg, model, work, strategy, num_processes) for strategy in STRATEGIES},
        traffic={strategy: _traffic(cfg, model, work, strategy, num_processes) for strategy in STRATEGIES},
        flops_per_image=step_flops(model, work),
        recomputed_flops=recomputed_flops(model, work),
        num_images=size,
        checkpoint_bytes=saved,
        num_checkpoints=_num_checkpoints(cfg),
        warnings=[*warnings, *schedule_warnings(cfg, model), *_warnings(cfg, size)],
    )


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _size_of_training_set(cfg: CfgNode) -> int | None:
    try:
        return sum(len(build_dataset(name)) for name in cfg.DATASETS.TRAIN)
    except FileNotFoundError:
        return None


def _num_checkpoints(cfg: CfgNode) -> int:
    """Periodic ones (one more while the newest is written), the final and the best."""
    solver = cfg.SOLVER
    num = solver.MAX_ITER // solver.CHECKPOINT_PERIOD if solver.CHECKPOINT_PERIOD else 0
    if solver.CHECKPOINT_MAX_TO_KEEP:
        kept = solver.MAX_ITER // solver.CHECKPOINT_KEEP_EVERY if solver.CHECKPOINT_KEEP_EVERY else 0
        num = min(num, solver.CHECKPOINT_MAX_TO_KEEP + kept + 1)
    return num + 1 + bool(cfg.TEST.BEST_METRIC)


def _memory(cfg: CfgNode, model: DINOv2, work: Workload, strategy: str, num_processes: int) -> dict[str, float]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    all_parameters = _numel(model)
    is_sharded = strategy == "fsdp" and num_processes > 1
    share = 1 / _group_size(cfg, num_processes) if is_sharded else 1.0
    activations = activation_bytes(model, work)
    memory: dict[str, float] = {
        "weights": 4 * all_parameters * share,
        "gradients": 4 * trained * share,
        "optimizer": 4 * _STATES[cfg.SOLVER.OPTIMIZER] * trained * share,
    }
    if is_sharded:
        activations.pop("weights in 16 bits")
        sizes = sorted(_unit_bytes(model, work, trained=False), reverse=True)
        gradients = sorted(_unit_bytes(model, work, trained=True), reverse=True)
        in_flight = sum(sizes[:_UNITS_IN_FLIGHT]) + sum(gradients[:_UNITS_IN_FLIGHT])
        memory["gathered units"] = in_flight + 4 * _numel_outside_units(model)
        if cfg.SOLVER.NUM_MICRO_BATCHES > 1:  # whole gradients wait for the last micro-batch
            memory["gathered gradients"] = 4 * trained
    memory |= {f"activations: {name}": size for name, size in activations.items() if size}
    return memory | {"activations: for a moment": workspace_bytes(model, work)}


def _group_size(cfg: CfgNode, num_processes: int) -> int:
    """Processes that split one copy of the model."""
    return min(cfg.MODEL.FSDP.GROUP_SIZE or num_processes, num_processes)


def _unit_bytes(model: DINOv2, work: Workload, *, trained: bool) -> list[float]:
    """Of each unit that is gathered: its gradients in fp32, or its parameters in the type they are gathered in."""
    sizes = []
    for unit in sharding_units(model):
        parameters = [p for module in unit.modules for p in module.parameters() if p.requires_grad or not trained]
        size = 2 if work.amp and unit.is_product and not trained else 4
        sizes.append(float(size * sum(p.numel() for p in parameters)))
    return sizes


def _numel_outside_units(model: DINOv2) -> int:
    return _numel(model) - sum(_numel(module) for unit in sharding_units(model) for module in unit.modules)


def _traffic(cfg: CfgNode, model: DINOv2, work: Workload, strategy: str, num_processes: int) -> dict[str, float]:
    """With n processes a ring sends (n - 1) / n of what is gathered or scattered, and twice that to sum it up.

    Groups that have a copy each scatter gradients within the group, and sum the shares up between groups.
    """
    ring = (num_processes - 1) / num_processes
    num_parts = cfg.SOLVER.NUM_MICRO_BATCHES
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if strategy == "ddp":
        traffic = {"gradients": 2 * ring * (2 if cfg.MODEL.DDP.FP16_COMPRESSION else 4) * trained}
    else:
        gathered = 4.0 * _numel_outside_units(model)
        for unit, size in zip(sharding_units(model), _unit_bytes(model, work, trained=False), strict=True):
            gathered += size * _num_gathers(cfg, model, work, unit)
        group = _group_size(cfg, num_processes)
        in_group, between = (group - 1) / group, 2 * (1 - group / num_processes) / group
        traffic = {"weights": in_group * num_parts * gathered, "gradients": (in_group + between) * 4 * trained}
    return traffic | {"objective": ring * num_parts * _objective_bytes(cfg, model, work, num_processes)}


def _num_gathers(cfg: CfgNode, model: DINOv2, work: Workload, unit: ShardingUnit) -> int:
    """How often a unit is gathered for one micro-batch: at each call, and at each backward pass of one."""
    is_head = len(unit.modules) == 1
    if any(p.requires_grad for module in unit.modules for p in module.parameters()):
        # The student's head sees all its rows at once, a block crops of all sizes if its attention can.
        return 2 * (1 if is_head or _is_packed(cfg, work) else 1 + bool(work.local_crops.num))
    # The teacher's head is called for CLS tokens and for patches.
    shared_head = model.patch_head == "dino_head" and model.dino_weight > 0 and model.ibot_weight > 0
    return 1 + (is_head and shared_head)


def _is_packed(cfg: CfgNode, work: Workload) -> bool:
    """Whether attention takes crops of all sizes in one call on a GPU.

    Of "auto" it is assumed in 16 bits, which torch's own kernel needs; in fp32 it depends on xformers.
    """
    attention = cfg.MODEL.ATTENTION
    return attention in ("varlen", "xformers") or (attention == "auto" and work.amp and cfg.MODEL.DEVICE != "cpu")


def _objective_bytes(cfg: CfgNode, model: DINOv2, work: Workload, num_processes: int) -> float:
    """Centres or the sums of Sinkhorn-Knopp, and the features among which KoLeo compares."""
    losses = cfg.MODEL.LOSS
    rounds = losses.SINKHORN_ITERS if losses.CENTERING == "sinkhorn_knopp" else 1
    heads = [model.student["dino_head"]] if losses.DINO_WEIGHT else []
    heads += [model.student[model.patch_head]] if losses.IBOT_WEIGHT else []
    prototypes = sum(head.last_layer.weight_v.shape[0] for head in heads if isinstance(head, DINOHead))
    is_shared = losses.KOLEO_WEIGHT > 0 and work.images % (losses.KOLEO_GROUP_SIZE or work.images + 1) > 0
    values = 0.0
    if is_shared:  # gathered, and their gradients summed up
        backbone = model.student["backbone"]
        assert isinstance(backbone, VisionTransformer)
        values = 3 * 2 * work.images * num_processes * backbone.embed_dim
    return 4 * (2 * rounds * prototypes + values)


def _warnings(cfg: CfgNode, num_images: int | None) -> list[str]:
    warnings = []
    head, batch = cfg.MODEL.DINO_HEAD, cfg.SOLVER.IMS_PER_BATCH
    if num_images is not None and num_images < head.NUM_PROTOTYPES:
        warnings.append(
            f"MODEL.DINO_HEAD.NUM_PROTOTYPES {head.NUM_PROTOTYPES:,} is more than the {num_images:,} images of the "
            "training set: prototypes without an image."
        )
    if (
        cfg.MODEL.LOSS.CENTERING == "sinkhorn_knopp"
        and cfg.MODEL.LOSS.DINO_WEIGHT
        and 2 * batch < head.NUM_PROTOTYPES / 16
    ):
        warnings.append(
            f"Sinkhorn-Knopp spreads {2 * batch:,} rows (2 views of SOLVER.IMS_PER_BATCH) over {head.NUM_PROTOTYPES:,} "
            "prototypes: each is asked for less than a sixteenth of a row."
        )
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "fp16":
        warnings.append("MODEL.PARALLEL fsdp is not possible in fp16; its column is that of SOLVER.AMP.PRECISION bf16.")
    if num_images is not None and batch > num_images:
        warnings.append(f"A batch of {batch:,} images is more than one pass over the training set ({num_images:,}).")
    return warnings


def _in_g_or_m(flops: float) -> str:
    return f"{flops / 1e9:,.1f} G" if flops >= 1e9 else f"{flops / 1e6:,.1f} M"


def render(plan: Plan, *, images_per_second: float = 0.0, gpu_memory_gib: float = 0.0) -> str:
    """The plan as text.

    Args:
        images_per_second: of one GPU, for the hours; 0: they are left out.
        gpu_memory_gib: of one GPU, for a warning; 0: unknown.
    """
    counts = plan.parameters
    images = plan.batch // plan.num_processes
    again = [("computed again", f"{_in_g_or_m(plan.recomputed_flops)} per image (activation checkpointing)")]
    again = again if plan.recomputed_flops else []
    rows: list[Sequence[str]] = [
        ("parameters", f"{counts.trained:,} trained ({_list(counts.parts)}); teacher {counts.teacher:,}"),
        ("batch", f"{plan.batch:,} images on {plan.num_processes} GPU(s): {images} each, {plan.work.images} at a time"),
        ("FLOPs per image", f"{_in_g_or_m(plan.flops_per_image)} (teacher, student forward and backward, attention)"),
        *again,
        ("images seen", f"{plan.images_seen:,} in {plan.num_iters:,} iterations{_passes(plan)}"),
        ("checkpoints", f"{plan.checkpoint_bytes / _GIB:,.2f} GiB each, {plan.num_checkpoints} at most: "
                        f"{plan.num_checkpoints * plan.checkpoint_bytes / _GIB:,.1f} GiB"),
    ]  # fmt: skip
    if images_per_second:
        hours = plan.hours(images_per_second)
        rows.append(
            (
                "hours",
                f"{hours:,.1f} at {images_per_second:g} images/s per GPU ({hours * plan.num_processes:,.0f} GPU hours)",
            )
        )
    sections = [tabulate(rows, tablefmt="plain", disable_numparse=True)]
    is_large = plan.total_memory("ddp") >= _GIB
    sections.append(
        _table(f"memory of a GPU, {'GiB' if is_large else 'MiB'}", plan.memory, _GIB if is_large else 2**20)
    )
    if plan.num_processes > 1:
        sections.append(_table("sent by a GPU in a step, MiB", plan.traffic, 2**20))
    warnings = [*plan.warnings, *_memory_warnings(plan, gpu_memory_gib)]
    sections += [f"warning: {warning}" for warning in warnings]
    return "\n\n".join(sections)


def _memory_warnings(plan: Plan, gpu_memory_gib: float) -> Iterator[str]:
    too_large = {name: plan.total_memory(name) / _GIB for name in STRATEGIES}
    too_large = {name: size for name, size in too_large.items() if size > _USABLE_SHARE * gpu_memory_gib > 0}
    if too_large:
        needs = " and ".join(f"{size:,.3g} GiB with {name}" for name, size in too_large.items())
        yield (
            f"A step needs {needs}; of the {gpu_memory_gib:g} GiB of a GPU a tenth is for what is not counted here. "
            "MODEL.ACTIVATION_CHECKPOINTING selective or full, SOLVER.NUM_MICRO_BATCHES and more GPUs make it less."
        )


def _list(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in parts.items())


def _passes(plan: Plan) -> str:
    if plan.num_images is None:
        return " (the training set is not at hand; --dataset-size gives its passes)"
    return f", {plan.images_seen / plan.num_images:,.1f} passes over {plan.num_images:,}"


def _table(title: str, columns: dict[str, dict[str, float]], unit: float) -> str:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(_cell(column.get(name), unit) for column in columns.values())] for name in names]
    rows.append(["total", *(_cell(sum(column.values()), unit) for column in columns.values())])
    return tabulate(
        rows, headers=[title, *columns], disable_numparse=True, colalign=("left", *("right" for _ in columns))
    )


def _cell(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.2f}"
