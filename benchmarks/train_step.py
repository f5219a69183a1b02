#!/usr/bin/env python
"""Time of the whole training step (teacher, student, losses, backward, clip, AdamW, EMA) without the loader.

    python benchmarks/train_step.py                                  # ViT-S/16 on the CPU, the setting of RESULTS.md
    python benchmarks/train_step.py --steps 20 MODEL.VIT.SIZE tiny   # any override

Prints images per second (median over steps) and peak memory with the exact setting. The same batch is used at every
step; on CUDA the device is synchronised around each.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dinoengine.config import get_cfg
from dinoengine.data import build_train_loader
from dinoengine.engine import SSLTrainer
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.solver import build_lr_scheduler, build_optimizer
from dinoengine.utils.env import collect_env_info
from dinoengine.utils.writers import peak_memory_mib

SETTING = [
    *("DATASETS.TRAIN", "synthetic:size=224", "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 8),
    *("MODEL.DEVICE", "cpu", "MODEL.VIT.SIZE", "small", "MODEL.VIT.DROP_PATH_RATE", 0.3),
    *("MODEL.DINO_HEAD.NUM_PROTOTYPES", 4096, "MODEL.LOSS.CENTERING", "sinkhorn_knopp"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after two that are not")
    parser.add_argument("--config-file", default="")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    args = parser.parse_intermixed_args()
    cfg = get_cfg()
    cfg.merge_from_list(SETTING)
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)

    model = SSLTrainer.build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    batch = next(iter(build_train_loader(cfg)))
    trainer = SimpleTrainer(
        model,
        _Repeat(batch),
        optimizer,
        precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32",
        clip_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
        num_micro_batches=cfg.SOLVER.NUM_MICRO_BATCHES,
        seed=0,
    )
    seconds = []
    for trainer.iter in range(args.steps + 2):
        _synchronize(cfg.MODEL.DEVICE)
        start = time.perf_counter()
        scheduler.apply(cfg.SOLVER.WARMUP_ITERS)
        trainer.run_step()
        model.update_teacher(0.99)
        _synchronize(cfg.MODEL.DEVICE)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    print(collect_env_info())
    print(f"setting: {' '.join(str(o) for o in [*SETTING, *args.opts])}")
    print(
        f"{cfg.SOLVER.IMS_PER_BATCH / median:.2f} images/s  (median of {args.steps} steps: {median:.3f} s, "
        f"{min(seconds[2:]):.3f} to {max(seconds[2:]):.3f}; peak memory {peak_memory_mib():.0f} MiB)"
    )


class _Repeat:
    """The same batch for ever."""

    def __init__(self, batch: object) -> None:
        self.batch = batch

    def __iter__(self) -> _Repeat:
        return self

    def __next__(self) -> object:
        return self.batch


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
