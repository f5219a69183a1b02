#!/usr/bin/env python
"""How the cost of the machinery grows: with the images of a dataset, the length of the log, the hooks, the prototypes.

    python benchmarks/scaling.py                        # everything, about five minutes on one core
    python benchmarks/scaling.py --parts log hooks      # some of it
    python benchmarks/scaling.py --tiny                 # a few seconds, sizes too small to say anything

Each size runs in a process of its own, forked. Seconds are those of the core, so that other work on the machine counts
little; memory is resident. Behind each table stand its knees: where a cost grows faster than the size.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo  # by every optimizer: here, so that its memory is not that of a size

from dinoengine.config import get_cfg
from dinoengine.data import build_dataset, build_train_loader, file_index
from dinoengine.data.folder_scan import FolderScan
from dinoengine.engine import HookBase, TrainerBase, default_writers, hooks
from dinoengine.engine.bare_step import BareStep
from dinoengine.utils.console import run_tool
from dinoengine.utils.env import collect_env_info
from dinoengine.utils.events import EventStorage
from dinoengine.utils.writers import JSONWriter

# A cost that is so much steeper than a straight line (exponent of the size) is called a knee, unless it is too small to
# be told from noise: in the unit of its column.
_STEEP = 1.25
_NOISE = {"ms": 2.0, "us": 5.0, "s": 0.5, "MiB": 10.0, "KiB": 512.0}
_LOOKUPS = 20_000
_SCALARS = ("total_loss", "loss_dino_global", "loss_dino_local", "loss_ibot", "loss_koleo", "grad_norm", "lr", "time")
_NUM_CLASSES = 1000

Costs = dict[str, float]  # column, whose last word is its unit -> value


# The images of a dataset -------------------------------------------------------------------------------------------------


def dataset_size(num_images: int) -> Costs:
    """The start of a training loader on images that need no files, and where positions are looked up."""
    cfg = get_cfg()
    cfg.merge_from_file("configs/debug.yaml")
    cfg.merge_from_list(["DATASETS.TRAIN", f"('synthetic:num_images={num_images}:size=48',)"])
    before, start = _resident_mib(), time.process_time()
    loader = build_train_loader(cfg, start_iter=num_images // 2)
    positions = next(iter(loader.batch_sampler))
    started = time.process_time()
    sampler = loader.dataset.sampler
    dice = random.Random(0)
    for _ in range(_LOOKUPS):
        sampler.index_at(dice.randrange(num_images))
    assert len(positions) == cfg.SOLVER.IMS_PER_BATCH
    return {
        "start ms": 1e3 * (started - start),
        "lookup us": 1e6 * (time.process_time() - started) / _LOOKUPS,
        "memory KiB": 1024 * (_resident_mib() - before),
    }


def folder_size(num_images: int) -> Costs:
    """A folder of that many files, of which only the listing is made: first start, and start from the kept index."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "train")
        os.environ["DINOENGINE_CACHE"] = os.path.join(folder, "cache")
        folders = [f"n{number:08d}" for number in range(_NUM_CLASSES)]
        for name in folders:
            os.makedirs(os.path.join(root, name))
        for name in (*folders, "."):  # of an age at which an index is trusted
            os.utime(os.path.join(root, name), (1, 1))
        first_seconds, _ = in_new_process(_start_with_listing, root, folders, num_images)
        seconds, mib = in_new_process(_start, root)
    return {"first start ms": 1e3 * first_seconds, "start ms": 1e3 * seconds, "memory MiB": mib}


def _start_with_listing(root: str, folders: list[str], num_images: int) -> tuple[float, float]:
    names = sorted(f"{folders[i % len(folders)]}/{i}.JPEG" for i in range(num_images))
    listing = FolderScan(names, Counter(), [(name, 1_000_000_000) for name in (".", *folders)])
    file_index.scan_folder = lambda *_: listing
    return _start(root)


def _start(root: str) -> tuple[float, float]:
    """(seconds, MiB held) of a dataset from which images all over it were looked up."""
    build_dataset("synthetic:num_images=1")  # what is imported only once
    before, start = _resident_mib(), time.process_time()
    dataset = build_dataset(f"folder:{root}")
    seconds = time.process_time() - start
    dice = random.Random(0)
    for _ in range(_LOOKUPS):
        dataset.path(index := dice.randrange(len(dataset))), dataset.label(index)
    return seconds, _resident_mib() - before


# The length of the log ---------------------------------------------------------------------------------------------------


class Logging(TrainerBase):
    """Steps that compute nothing and log what a training logs."""

    def run_step(self) -> None:
        for name in _SCALARS:
            self.storage.put_scalar(name, random.random(), role="loss" if name.startswith("loss") else "")


def log_length(iterations: int) -> Costs:
    """A run of that many iterations with metrics.json and the console's lines, and its resume."""
    logging.getLogger("dinoengine").setLevel(logging.WARNING)  # lines are made and not shown
    with tempfile.TemporaryDirectory() as folder:
        trainer = Logging()
        writers = default_writers(folder, iterations, tensorboard=False, progress_bar=False)
        trainer.register_hooks([hooks.PeriodicWriter(writers, 20)])
        trainer.train(0, min(iterations, 10_000) // 10)  # buffers of fixed length fill up
        before, start = _resident_mib(), time.process_time()
        trainer.train(trainer.iter, iterations)
        seconds, held = time.process_time() - start, _resident_mib() - before
        path = os.path.join(folder, "metrics.json")
        resume_seconds, resume_mib = in_new_process(_resume, path, iterations - 10)
        size = os.path.getsize(path)
    return {
        "iteration us": 1e6 * seconds / (iterations - min(iterations, 10_000) // 10),
        "memory MiB": held,
        "metrics.json MiB": size / 2**20,
        "resume s": resume_seconds,
        "resume memory MiB": resume_mib,
    }


def _resume(path: str, start_iter: int) -> tuple[float, float]:
    before, start = _resident_mib(), time.process_time()
    with EventStorage(start_iter):
        JSONWriter(path, start_iter).write()
    return time.process_time() - start, _peak_mib() - before


# Hooks and prototypes ----------------------------------------------------------------------------------------------------


class Counting(HookBase):
    """A hook with state that does next to nothing."""

    def __init__(self, number: int) -> None:
        self._name, self.calls = f"Counting{number}", 0

    @property
    def name(self) -> str:
        return self._name

    def after_step(self) -> None:
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}


def num_hooks(number: int, iterations: int = 200) -> Costs:
    trainer = Logging()
    start = time.process_time()
    trainer.register_hooks([Counting(i) for i in range(number)])
    registered = time.process_time()
    trainer.train(0, iterations)
    return {
        "register ms": 1e3 * (registered - start),
        "iteration us": 1e6 * (time.process_time() - registered) / iterations,
    }


def num_prototypes(number: int, steps: int = 5) -> Costs:
    """The whole step of the debug config (a ViT of two narrow layers, 8 images), Sinkhorn-Knopp."""
    torch.set_num_threads(1)
    cfg = get_cfg()
    cfg.merge_from_file("configs/debug.yaml")
    cfg.merge_from_list(["MODEL.DINO_HEAD.NUM_PROTOTYPES", number, "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["MODEL.LOSS.CENTERING", "sinkhorn_knopp", "MODEL.DEVICE", "cpu"])
    batch = next(iter(build_train_loader(cfg)))
    before = _resident_mib()
    step = BareStep(cfg, batch)
    seconds = []
    for _ in range(1 + steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"step ms": 1e3 * statistics.median(seconds[1:]), "peak memory MiB": _peak_mib() - before}


# Tables ------------------------------------------------------------------------------------------------------------------

Part = tuple[Callable[[int], Costs], str, list[int], list[int]]  # measure, what is counted, sizes, sizes of --tiny
PARTS: dict[str, Part] = {
    "dataset": (dataset_size, "images", [10**n for n in range(4, 10)], [10**4, 10**9]),
    "folder": (folder_size, "images", [10**n for n in range(4, 8)], [10**4, 2 * 10**4]),
    "log": (log_length, "iterations", [10**n for n in range(3, 7)], [100, 1000]),
    "hooks": (num_hooks, "hooks", [1, 10, 100, 1000, 10_000], [1, 10]),
    "prototypes": (num_prototypes, "prototypes", [2**n for n in range(10, 20, 3)], [64, 128]),
}


def knees(sizes: Sequence[int], rows: Sequence[Costs]) -> Iterator[str]:
    """A line for each place where a cost grows by a power of the size that is well above one."""
    for (size, row), (larger, next_row) in itertools.pairwise(zip(sizes, rows, strict=True)):
        for column, cost in next_row.items():
            if cost < _NOISE[column.split()[-1]]:
                continue
            exponent = math.log(cost / max(row[column], 1e-9)) / math.log(larger / size)
            # A constant part hides the slope of the small sizes, never that of the large ones.
            if exponent > _STEEP and row[column] >= _NOISE[column.split()[-1]]:
                yield f"{column}: grows as n^{exponent:.1f} from {size:,} to {larger:,}"


def table(counted: str, sizes: Sequence[int], rows: Sequence[Costs]) -> str:
    """Markdown."""
    lines = [" | ".join((counted, *rows[0])), " | ".join("---" for _ in (counted, *rows[0]))]
    lines += [
        " | ".join((f"{size:,}", *(f"{cost:,.3g}" if cost < 100 else f"{cost:,.0f}" for cost in row.values())))
        for size, row in zip(sizes, rows, strict=True)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a forked process, which ends and leaves no memory behind."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(work(*arguments)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__}{arguments} ended without a result; see above.") from None
    finally:
        process.join()


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="two small sizes of each")
    args = parser.parse_args(argv)
    print(collect_env_info())
    for name in args.parts:
        measure, counted, sizes, tiny_sizes = PARTS[name]
        sizes = tiny_sizes if args.tiny else sizes
        rows = [in_new_process(measure, size) for size in sizes]
        print(f"\n{name}\n\n{table(counted, sizes, rows)}\n")
        print("\n".join(knees(sizes, rows)) or "No knee: straight lines or better.", flush=True)


if __name__ == "__main__":
    run_tool(main)
