#!/usr/bin/env python
"""Speed and memory on one GPU in a few minutes: training steps of four models, loader, crops on the device, k-NN search.

    python benchmarks/gpu.py                     # at most 8 minutes
    python benchmarks/gpu.py --minutes 3         # the rows that matter most
    python benchmarks/gpu.py --tiny              # the same on the CPU with a micro model: whether it runs, not how fast

Each row runs in a process of its own, so that one which fails, or for which memory does not suffice, costs no other. A
step is everything but the loader: the copy to the device, teacher, student, losses, backward pass, clipping, AdamW, the
teacher's update; the same batch each time, median of the steps behind the first few. TFLOP/s are those that the model needs
(``engine.workload.step_flops``: recomputed activations do not count); the last share is of the rate at which the same
process then multiplied two large matrices of the same type. Memory is the peak of allocations, on a CPU of the process.

Prints a table in Markdown, then the same as one line of JSON.
"""

from __future__ import annotations

import os

# Before torch: it then asks the driver whether there is a GPU without opening it, which no forked process would survive.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # by every optimizer: once, and not in each process
from PIL import Image

from dinoengine.config import CfgNode, ConfigError, get_cfg, validate
from dinoengine.data import DecodedBatch, Synthetic, build_train_loader
from dinoengine.data.loader_timing import loader_rate
from dinoengine.engine.bare_step import BareStep
from dinoengine.engine.precision import PRECISIONS
from dinoengine.engine.workload import Workload, require_known_parts, step_flops
from dinoengine.evaluation import NeighbourSearch
from dinoengine.utils.console import run_tool
from dinoengine.utils.env import collect_env_info
from dinoengine.utils.writers import peak_memory_mib

ROOT = Path(__file__).resolve().parent.parent
_SHORT = "configs/dinov2/vitl16_short.yaml"
_SHARED: list[Any] = ["DATASETS.TRAIN", "('synthetic:num_images=256:size=256',)", "DATALOADER.NUM_WORKERS", 0]
_BF16: list[Any] = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.PRECISION", "bf16", "SOLVER.IMS_PER_BATCH", 64]

Row = dict[str, Any]


# What is varied: a key below MODEL and its value. A version without the key, or a device without the choice, makes a row
# that says so.
VARIANTS: dict[str, tuple[str, Any]] = {
    "compiled": ("COMPILE", True),
    "checkpointing selective": ("ACTIVATION_CHECKPOINTING", "selective"),
    "checkpointing full": ("ACTIVATION_CHECKPOINTING", "full"),
    "attention sdpa": ("ATTENTION", "sdpa"),
    "attention varlen": ("ATTENTION", "varlen"),
    "attention xformers": ("ATTENTION", "xformers"),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured: the models (a config and what is changed in it), and how large the rest is."""

    models: dict[str, tuple[str, list[Any]]]
    variants: Sequence[str]
    warm_up_steps: int
    steps: int
    matrix_size: int
    neighbours: tuple[int, int, int, int]  # rows of the bank, queries, width, k
    loader_workers: int
    loader_batches: int


FULL = Scale(
    models={
        "ViT-L/16": (_SHORT, _BF16),
        # The share of one of the 96 published GPUs.
        "ViT-L/14 SwiGLU": ("configs/dinov2/vitl14.yaml", [*_BF16, "SOLVER.IMS_PER_BATCH", 32]),
        "ViT-B/16": (_SHORT, [*_BF16, "MODEL.VIT.SIZE", "base"]),
        "ViT-S/16": (_SHORT, [*_BF16, "MODEL.VIT.SIZE", "small"]),
    },
    variants=list(VARIANTS),
    warm_up_steps=5,
    steps=20,
    matrix_size=8192,
    neighbours=(1_281_167, 50_000, 1024, 20),
    loader_workers=os.cpu_count() or 1,
    loader_batches=30,
)
TINY = Scale(
    models={"ViT-micro/8": ("configs/debug.yaml", ["MODEL.DEVICE", "cpu"])},
    variants=[how for how in VARIANTS if how != "compiled"],  # the compiler takes longer than all the rest
    warm_up_steps=1,
    steps=2,
    matrix_size=256,
    neighbours=(2000, 100, 16, 20),
    loader_workers=0,
    loader_batches=2,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A row: what and how, and the function that measures it in a process of its own."""

    what: str
    how: str
    measure: Callable[[], Row]


def tasks(scale: Scale) -> Iterator[Task]:
    """In order of importance: a time limit takes the last ones."""
    for name in scale.models:
        yield Task(name, "as configured", lambda name=name: time_steps(scale, name))
    rows, queries, dim, _ = scale.neighbours
    yield Task("k-NN search", f"{queries:,} queries in {rows:,} x {dim}", lambda: time_search(scale))
    for backend, makes in {
        "fast": "fast crops",
        "device": "images for the device",
        "reference": "reference crops",
    }.items():
        how = f"{makes}, {scale.loader_workers} workers"
        yield Task("loader", how, lambda backend=backend: time_loader(scale, backend))
    yield Task("crops on the device", "alone, nothing else runs", lambda: time_device_crops(scale))
    for name in scale.models:
        for how in scale.variants:
            yield Task(name, how, lambda name=name, change=VARIANTS[how]: time_steps(scale, name, *change))


# What is measured, each in its own process -------------------------------------------------------------------------------


def time_steps(scale: Scale, name: str, key: str = "", value: Any = None) -> Row:
    """
    Args:
        key, value: of what is varied; empty: nothing.
    """
    cfg = config_of(scale, name)
    if key and key not in cfg.MODEL:
        return {"status": f"not available: no key {key} of MODEL"}
    cfg.merge_from_list([f"MODEL.{key}", value] if key else [])
    try:
        validate(cfg, world_size=1)
    except ConfigError as error:
        return {"status": f"not available: {' '.join(error.problems)}"}
    batch = batch_of(cfg)
    step = BareStep(cfg, batch.pin_memory() if cfg.MODEL.DEVICE == "cuda" else batch)
    device = step.trainer.device
    times = [timed(step, device) for _ in range(scale.warm_up_steps + scale.steps)]
    seconds = statistics.median(times[scale.warm_up_steps :])
    flops = step_flops(require_known_parts(step.model), Workload.of(cfg, 1)) * cfg.SOLVER.IMS_PER_BATCH
    return {
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        **{"seconds": seconds, "images_per_second": cfg.SOLVER.IMS_PER_BATCH / seconds, "peak_mib": peak_memory_mib()},
        **compared(flops / seconds, scale, PRECISIONS[step.trainer.precision] or torch.float32, device),
    }


def time_search(scale: Scale) -> Row:
    num_rows, num_queries, dim, k = scale.neighbours
    device = torch.device(_device(scale))
    torch.set_float32_matmul_precision(get_cfg().FLOAT32_PRECISION)
    generator = torch.Generator(device).manual_seed(0)
    bank = torch.randn(num_rows, dim, device=device, generator=generator)
    queries = torch.randn(num_queries, dim, device=device, generator=generator)
    search = NeighbourSearch(bank, k)
    del bank

    def find(rows: torch.Tensor) -> None:
        for _ in search.search(rows):
            pass

    find(queries[: num_queries // 10])
    seconds = timed(lambda: find(queries), device)
    return {
        **{"seconds": seconds, "images_per_second": num_queries / seconds, "peak_mib": peak_memory_mib()},
        **compared(2 * num_rows * num_queries * dim / seconds, scale, torch.float32, device),
    }


def time_loader(scale: Scale, backend: str) -> Row:
    """JPEG files of 500 x 375 to batches in shared memory."""
    with loader_config(scale, backend) as cfg:
        cfg.DATALOADER.NUM_WORKERS = scale.loader_workers
        torch.set_num_threads(1)
        rate = loader_rate(cfg, scale.loader_batches)
    batch = cfg.SOLVER.IMS_PER_BATCH
    return {"batch": batch, "seconds": batch / rate, "images_per_second": rate}


def time_device_crops(scale: Scale) -> Row:
    """A batch of the same images that lies on the device, to its crops."""
    device = torch.device(_device(scale))
    with loader_config(scale, "device") as cfg:
        batch: DecodedBatch = next(iter(build_train_loader(cfg))).copied_to(device)
    batch.with_crops()
    seconds = statistics.median(timed(batch.with_crops, device) for _ in range(scale.steps))
    rate = len(batch) / seconds
    return {"batch": len(batch), "seconds": seconds, "images_per_second": rate, "peak_mib": peak_memory_mib()}


@contextlib.contextmanager
def loader_config(scale: Scale, backend: str) -> Iterator[CfgNode]:
    """A config whose training set are JPEG files of 500 x 375, which are there while it runs; no workers."""
    with tempfile.TemporaryDirectory() as folder:
        images = Synthetic(num_images=32, size=500)
        for i in range(len(images)):
            pixels = np.ascontiguousarray(images.render(i)[:375])
            Image.fromarray(pixels).save(Path(folder) / f"{i:03d}.jpg", quality=90)
        cfg = config_of(scale, next(iter(scale.models)))
        cfg.merge_from_list(["DATASETS.TRAIN", f"('folder:{folder}',)", "INPUT.AUGMENTATION_BACKEND", backend])
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"])
        yield cfg


def compared(flops_per_second: float, scale: Scale, dtype: torch.dtype, device: torch.device) -> Row:
    """A rate, and what part it is of that of a matrix product."""
    left, right = (torch.randn(scale.matrix_size, scale.matrix_size, dtype=dtype, device=device) for _ in range(2))
    seconds = statistics.median(timed(lambda: left @ right, device) for _ in range(20))
    matrix_rate = 2 * scale.matrix_size**3 / seconds
    return {
        "tflops": flops_per_second / 1e12,
        "matrix_tflops": matrix_rate / 1e12,
        "share_of_matrix_rate": flops_per_second / matrix_rate,
    }


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def config_of(scale: Scale, name: str) -> CfgNode:
    file, changes = scale.models[name]
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / file))
    cfg.merge_from_list([*_SHARED, *changes])
    return cfg


def _device(scale: Scale) -> str:
    return str(config_of(scale, next(iter(scale.models))).MODEL.DEVICE)


# Processes, tables -------------------------------------------------------------------------------------------------------

_batches: dict[tuple[Any, ...], Any] = {}


def batch_of(cfg: CfgNode) -> Any:
    """A batch on the CPU, the same for all models that take the same input; made before processes are forked."""
    of_input = (cfg.INPUT.dump(), cfg.MODEL.VIT.PATCH_SIZE_PX, cfg.SOLVER.IMS_PER_BATCH)
    if of_input not in _batches:
        cfg = cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
        _batches[of_input] = next(iter(build_train_loader(cfg)))
    return _batches[of_input]


def run(task: Task, seconds: float) -> Row:
    """The row of a task; one that fails, or takes longer, says so in its status."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, task))
    process.start()
    theirs.close()
    row: Row = {"what": task.what, "how": task.how, "status": "ok"}
    try:
        row |= ours.recv() if ours.poll(seconds) else {"status": f"stopped after {seconds:.0f} s"}
    except EOFError:
        process.join()
        row["status"] = f"failed: the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    return row


def _answer(connection: Connection, task: Task) -> None:
    try:
        connection.send(task.measure())
    except (torch.OutOfMemoryError, MemoryError):
        connection.send({"status": "out of memory"})
    except Exception as error:  # the others are to run
        connection.send({"status": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})


_COLUMNS: dict[str, tuple[str, float, str]] = {  # head -> entry of a row, factor, format
    "batch": ("batch", 1, "d"),
    "ms": ("seconds", 1e3, ",.1f"),
    "images/s": ("images_per_second", 1, ",.1f"),
    "peak MiB": ("peak_mib", 1, ",.0f"),
    "TFLOP/s": ("tflops", 1, ".3g"),
    "matrix product": ("matrix_tflops", 1, ".3g"),
    "share %": ("share_of_matrix_rate", 100, ".0f"),
}


def table(rows: Sequence[Row]) -> str:
    """Markdown; empty cells where a row has no such figure."""
    heads = ["what", "how", *_COLUMNS, "status"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [format(row[entry] * factor, form) if entry in row else "" for entry, factor, form in _COLUMNS.values()]
        lines.append([row["what"], row["how"], *cells, row["status"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="stop after this time")
    parser.add_argument("--row-seconds", type=float, default=120.0, metavar="N", help="stop a row after this time")
    parser.add_argument("--tiny", action="store_true", help="a micro model on the CPU")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    scale = TINY if args.tiny else FULL
    if not args.tiny and not torch.cuda.device_count():
        parser.error("no GPU is visible to torch; --tiny runs on the CPU.")

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for name in scale.models:
        batch_of(config_of(scale, name))
    rows = []
    for task in tasks(scale):
        left = end - time.monotonic()
        row = {"what": task.what, "how": task.how, "status": "not reached in the time given"}
        rows.append(run(task, min(left, args.row_seconds)) if left > 0 else row)
        print(f"{task.what}, {task.how}: {rows[-1]['status']}", file=sys.stderr, flush=True)
    print(collect_env_info())
    print(f"\n{table(rows)}\n\n{json.dumps(rows)}")


if __name__ == "__main__":
    run_tool(main)
