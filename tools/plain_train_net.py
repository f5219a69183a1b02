#!/usr/bin/env python
"""The training of tools/train_net.py without trainer and hooks: the engine, read from top to bottom.

It gives the same losses, which a test checks. What it leaves out is what hooks add: metrics files, TensorBoard,
evaluation during training, profiling, skipping bad steps, mixed precision, accumulation. Copy it when you want a loop
of your own.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from dinoengine.checkpoint import Checkpointer
from dinoengine.checkpoint.resuming import FINAL
from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine import (
    SSLTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    exit_on_user_error,
    launch,
    load_config,
    load_weights_for_evaluation,
)
from dinoengine.solver import build_lr_scheduler, build_optimizer, build_teacher_schedules, clip_grad_norms_
from dinoengine.utils import comm
from dinoengine.utils.env import seed_step_rng


def train(cfg: CfgNode) -> tuple[nn.Module, list[float]]:
    """Train from scratch (or MODEL.WEIGHTS); returns the model and this rank's total loss of every iteration."""
    cfg = SSLTrainer.auto_scale_workers(cfg, comm.get_world_size())
    model = SSLTrainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, strict=cfg.MODEL.WEIGHTS_STRICT, metadata={"config": cfg.dump()})
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    ddp_model = create_ddp_model(
        model,
        fp16_compression=cfg.MODEL.DDP.FP16_COMPRESSION,
        find_unused_parameters=cfg.MODEL.DDP.FIND_UNUSED_PARAMETERS,
    )
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    teacher_schedules = build_teacher_schedules(cfg)
    device = next(model.parameters()).device
    batches = iter(build_train_loader(cfg))
    losses = []
    started = time.perf_counter()

    model.train()
    for iteration in range(cfg.SOLVER.MAX_ITER):
        lr = scheduler.apply(iteration)["lr"]
        model.teacher_temp = teacher_schedules["teacher_temp"](iteration)  # type: ignore[assignment]

        batch = next(batches).to(device, non_blocking=True)
        seed_step_rng(cfg.SEED, iteration, comm.get_rank())  # after the batch: starting a loader draws from it too
        loss = ddp_model(batch).total()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norms_(model.clip_groups(), cfg.SOLVER.CLIP_GRAD_NORM)  # type: ignore[operator]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"Loss is {loss.item()} in iteration {iteration}.")
        optimizer.step()
        model.update_teacher(teacher_schedules["teacher_momentum"](iteration))  # type: ignore[operator]

        losses.append(loss.item())
        if (iteration + 1) % cfg.LOG.PERIOD == 0 and comm.is_main_process():
            speed = (iteration + 1) * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - started)
            print(f"iter {iteration + 1}/{cfg.SOLVER.MAX_ITER}  loss {loss:.4f}  lr {lr:.3g}  img/s {speed:.0f}")
    checkpointer.save(FINAL, iteration=cfg.SOLVER.MAX_ITER - 1)
    return model, losses


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process of a run."""
    with exit_on_user_error():
        if args.resume or args.fork_from:
            raise ValueError(
                "plain_train_net.py cannot --resume or --fork-from: it saves no optimizer. Use train_net.py."
            )
        if cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.NUM_MICRO_BATCHES > 1 or cfg.SOLVER.NON_FINITE_MAX_SKIPS:
            raise ValueError(
                "plain_train_net.py has no SOLVER.AMP, NUM_MICRO_BATCHES and NON_FINITE_MAX_SKIPS. Use train_net.py."
            )
        if cfg.MODEL.CLASSIFIER.NUM_CLASSES:
            raise ValueError("plain_train_net.py is the loop of pretraining; train a classifier with train_net.py.")
        cfg = default_setup(cfg, args)
        if args.eval_only:
            model = SSLTrainer.build_model(cfg)
            load_weights_for_evaluation(cfg, model, resume=False)
    if not args.eval_only:
        model, _ = train(cfg)
    SSLTrainer.test(cfg, model)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_on_user_error():
        cfg = load_config(args)
    where = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    launch(main, *where, args=(cfg, args), device=cfg.MODEL.DEVICE)
