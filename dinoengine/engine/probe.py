"""A few steps of a config on this machine: what a plan estimated, measured, and how fast they are."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine.bare_step import BareStep
from dinoengine.engine.living_storages import LivingStorages
from dinoengine.engine.precision import PRECISIONS, resolve_precision
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.workload import Workload, activation_bytes, recomputed_flops, require_known_parts, step_flops
from dinoengine.modeling.backbone.vit import VisionTransformer
from dinoengine.modeling.meta_arch.dinov2 import DINOv2
from dinoengine.structures import SSLBatch

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Comparison:
    """An estimate beside what was measured."""

    name: str
    unit: str
    estimated: float
    measured: float

    def __str__(self) -> str:
        error = self.estimated / self.measured - 1
        return f"{self.name}: estimated {self.estimated:,.2f} {self.unit}, measured {self.measured:,.2f} ({error:+.1%})"


@dataclass(frozen=True)
class Probe:
    """
    Attributes:
        images_per_second: of one process, the median over steps: a whole step without loading.
        setting: what was run.
    """

    comparisons: list[Comparison]
    images_per_second: float
    setting: str


def run_probe(cfg: CfgNode, num_processes: int, num_steps: int) -> Probe:
    """Run steps of one process's share of the batch, on images made up; nothing is written.

    Args:
        num_steps: timed ones, after two that are not.
    """
    cfg = cfg.clone()
    cfg.defrost()
    share = cfg.SOLVER.IMS_PER_BATCH // num_processes
    size = max(*cfg.INPUT.GLOBAL_CROPS.SIZE_PX, *cfg.INPUT.LOCAL_CROPS.SIZE_PX)
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", share, "DATALOADER.NUM_WORKERS", 0, "SEED", max(0, cfg.SEED)])
    cfg.merge_from_list(["DATASETS.TRAIN", f"('synthetic:num_images={max(share, 2)}:size={size}',)"])
    # What is about the images of the run says nothing of those made up.
    cfg.merge_from_list(["DATASETS.TRAIN_WEIGHTS", "()", "DATASETS.QUARANTINE", "()"])
    cfg.merge_from_list(["DATALOADER.SAMPLER", "uniform", "DATALOADER.SAMPLE_WEIGHTS", ""])
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0  # LRs do not matter here
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = resolve_precision(cfg, list)
    batch = next(iter(build_train_loader(cfg)))
    step = BareStep(cfg, batch)
    trainer, model = step.trainer, require_known_parts(step.model)
    comparisons = _compare(trainer, model, batch, Workload.of(cfg, 1))
    seconds = [_timed(step) for _ in range(_WARM_UP_STEPS + num_steps)][_WARM_UP_STEPS:]
    setting = (
        f"{share} images, {trainer.precision}, {trainer.device}, {torch.get_num_threads()} threads, {num_steps} steps"
    )
    return Probe(comparisons, share / statistics.median(seconds), setting)


def _compare(trainer: SimpleTrainer, model: DINOv2, batch: SSLBatch, work: Workload) -> list[Comparison]:
    batch = batch.to(trainer.device)
    part = batch.split(trainer.num_micro_batches)[0]
    dtype = PRECISIONS[trainer.precision]
    with torch.autocast(trainer.device.type, dtype=dtype, enabled=dtype is not None):
        kept = measure_saved_bytes(model, batch, trainer.num_micro_batches)
        flops = measure_flops(model, part)
    estimate = sum(activation_bytes(model, work).values())
    operations = step_flops(model, work) + recomputed_flops(model, work)
    return [
        Comparison("kept for the backward pass", "MiB", estimate / 2**20, kept / 2**20),
        Comparison("operations of a step", "GFLOP an image", operations / 1e9, flops / len(part) / 1e9),
    ]


def measure_saved_bytes(model: DINOv2, batch: SSLBatch, num_micro_batches: int = 1) -> int:
    """Bytes that the forward pass of the first micro-batch leaves for its backward pass and the next micro-batches, without
    parameters and the batch itself."""
    own = [*model.parameters(), *model.buffers(), *(v for v in vars(batch).values() if isinstance(v, Tensor))]
    with LivingStorages(own) as storages:
        parts = model.split_batch(batch, num_micro_batches)
        loss = model(parts[0]).total()
    torch.clear_autocast_cache()  # a step leaves autocast before its backward pass
    kept = storages.num_bytes()
    del loss, parts
    return kept


def measure_flops(model: DINOv2, batch: SSLBatch) -> int:
    """Operations of a forward and backward pass as torch counts them, attention as plain products; what activation
    checkpointing computes again counts again."""
    student = model.student["backbone"]
    assert isinstance(student, VisionTransformer)
    execution = student.execution
    student.execution = execution._replace(attention="sdpa")  # the only kernel that has plain products
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(batch).total().backward()
    finally:
        student.execution = execution
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _timed(step: BareStep) -> float:
    start = time.perf_counter()
    step()
    if step.trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
