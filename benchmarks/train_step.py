#!/usr/bin/env python
"""The whole training step beside the published one, in turns in one run, each in a process of its own.

    python benchmarks/train_step.py                        # ViT-S/16, 2 x 224 + 8 x 96, batch 8
    python benchmarks/train_step.py --setting tiny         # 192 wide, patch 4, 2 x 32 + 6 x 16, batch 64
    python benchmarks/train_step.py MODEL.VIT.DROP_PATH_RATE 0.0 --only ours

"ours" and "published" do teacher, student, losses, backward, clip, AdamW and the teacher's update on one batch that the
loader made once; "ours compiled", run only where --only names it, does so with MODEL.COMPILE. "our backbone" and "timm
backbone" do forward and backward of the backbone on the same crops, without stochastic depth. FLOPs are those of matrix
products and attention that torch counts in one step of each; the rate they are compared with is that of a 2048 x 2048
float32 product in the same turns. Memory is the peak of the process, Python and torch included. Ratios are medians over the
turns: on a shared machine only they count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from step.contenders import CONTENDERS, MatrixProduct
from torch.utils.flop_counter import FlopCounterMode

from dinoengine.config import CfgNode, get_cfg
from dinoengine.config.defaults import cfg_from_text
from dinoengine.data import build_train_loader
from dinoengine.structures import SSLBatch
from dinoengine.utils.env import collect_env_info
from dinoengine.utils.writers import peak_memory_mib

# Compiling takes minutes, so it is asked for: --only "ours compiled" ...
DEFAULT = [name for name in CONTENDERS if name != "ours compiled"]
_SHARED: list[Any] = [
    *("DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "MODEL.VIT.DROP_PATH_RATE", 0.3),
    *("MODEL.LOSS.CENTERING", "sinkhorn_knopp"),
]
SETTINGS: dict[str, list[Any]] = {
    "small": [
        *_SHARED,
        *("DATASETS.TRAIN", "synthetic:size=224", "SOLVER.IMS_PER_BATCH", 8, "MODEL.VIT.SIZE", "small"),
        *("MODEL.DINO_HEAD.NUM_PROTOTYPES", 4096),
    ],
    "tiny": [
        *_SHARED,
        *("DATASETS.TRAIN", "synthetic:size=32", "SOLVER.IMS_PER_BATCH", 64, "MODEL.VIT.SIZE", "tiny"),
        *("MODEL.VIT.PATCH_SIZE_PX", 4, "INPUT.GLOBAL_CROPS.SIZE_PX", 32, "INPUT.LOCAL_CROPS.SIZE_PX", 16),
        *("INPUT.LOCAL_CROPS.NUM", 6, "MODEL.DINO_HEAD.NUM_PROTOTYPES", 1024),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="small")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each, after two that are not")
    parser.add_argument("--only", nargs="+", choices=sorted(CONTENDERS), default=DEFAULT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the cores instead of the clock: for a machine that is busy"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    args = parser.parse_intermixed_args()
    if args.turns < 1 or args.threads < 1:
        parser.error(f"--turns and --threads must be 1 or more, got {args.turns} and {args.threads}.")
    cfg = get_cfg()
    cfg.merge_from_list(SETTINGS[args.setting])
    cfg.merge_from_list(args.opts)

    print(collect_env_info())
    print(f"setting: {' '.join(str(o) for o in [*SETTINGS[args.setting], *args.opts])}; {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        batch_file = Path(folder) / "batch.pt"
        torch.save(vars(next(iter(build_train_loader(cfg)))), batch_file)
        processes = {name: Process(name, cfg, batch_file, args.threads) for name in args.only}
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for turn in range(args.turns + 2):
            print(f"turn {turn + 1} of {args.turns + 2}", file=sys.stderr)
            for name, process in processes.items():
                seconds[name].append(process.ask("cpu step" if args.cpu_time else "step"))
        report(
            {name: times[2:] for name, times in seconds.items()},
            {name: process.ask("memory") for name, process in processes.items()},
            {name: process.ask("flops") for name, process in processes.items()},
            cfg.SOLVER.IMS_PER_BATCH,
        )
        for process in processes.values():
            process.end()


def report(seconds: dict[str, list[float]], memory: dict[str, float], flops: dict[str, float], num_images: int) -> None:
    """Print a row per contender, then the ratios between those that do the same work."""
    product = seconds.get("matrix product")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = flops[name] / median / 1e9
        row = f"{name:15} {median:8.3f} s ({min(times):.3f} to {max(times):.3f})  {rate:6.1f} GFLOP/s"
        if name != "matrix product":
            row += f"  {num_images / median:7.2f} images/s  {flops[name] / 1e9:6.0f} GFLOP  peak {memory[name]:.0f} MiB"
            if product:
                shares = [
                    flops[name] / t / (2 * MatrixProduct.SIZE**3 / p) for t, p in zip(times, product, strict=True)
                ]
                row += f"  {statistics.median(shares):.2f} of the matrix rate"
        print(row)
    for mine, theirs in (("ours", "published"), ("ours compiled", "published"), ("our backbone", "timm backbone")):
        if mine in seconds and theirs in seconds:
            ratios = [t / m for t, m in zip(seconds[theirs], seconds[mine], strict=True)]
            print(
                f"{mine} is {statistics.median(ratios):.2f} times as fast as {theirs} (median of {len(ratios)} turns, "
                f"{min(ratios):.2f} to {max(ratios):.2f}), with {memory[mine] / memory[theirs]:.2f} of its memory"
            )


class Process:
    """A contender in a process of its own, which sleeps between its turns."""

    def __init__(self, name: str, cfg: CfgNode, batch_file: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, cfg.dump(), batch_file, threads), daemon=True)
        self._process.start()
        other.close()
        self._connection.recv()

    def ask(self, question: str) -> float:
        """ "step": its seconds; "cpu step": those of all its threads; "memory": the peak in MiB; "flops": of one step."""
        self._connection.send(question)
        answer: float = self._connection.recv()
        return answer

    def end(self) -> None:
        self._connection.send("end")
        self._process.join()


def _serve(connection: Connection, name: str, cfg_text: str, batch_file: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    cfg = cfg_from_text(cfg_text)
    contender = CONTENDERS[name](cfg, SSLBatch(**torch.load(batch_file, weights_only=True)))
    connection.send("ready")
    while (question := connection.recv()) != "end":
        if question in ("step", "cpu step"):
            clock = time.perf_counter if question == "step" else time.process_time
            _synchronize(cfg.MODEL.DEVICE)
            start = clock()
            contender()
            _synchronize(cfg.MODEL.DEVICE)
            connection.send(clock() - start)
        elif question == "memory":
            connection.send(peak_memory_mib())
        else:
            with FlopCounterMode(display=False) as counter:
                contender()
            connection.send(float(counter.get_total_flops()))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
