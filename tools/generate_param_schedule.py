#!/usr/bin/env python
"""Print learning rate and weight decay per layer and the schedules of a config; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os

import torch
from tabulate import tabulate
from torch import nn

from dinoengine.config import CfgNode, read_cfg, validate
from dinoengine.config.arguments import config_parser
from dinoengine.engine import exit_on_user_error
from dinoengine.modeling import build_model
from dinoengine.solver import scaled_lr
from dinoengine.solver.report import (
    layer_table,
    schedule_values,
    schedule_warnings,
    turning_points,
    with_equal_blocks_together,
)
from dinoengine.solver.schedule_plot import plot_schedules
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Print what the optimizer of a config will do: the factors of learning rate and weight decay of every layer, the values of
all schedules at chosen iterations, and a warning for each schedule that cannot be meant (a warm-up longer than the run,
an LR that never reaches its peak ...). The model is built without memory for its weights, so any size is quick.
"""

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE. Examples:

  at the turning points of the schedules:
    %(prog)s --config-file configs/dinov2/vitl14.yaml
  at iterations of your own, and as a picture:
    %(prog)s --config-file configs/dinov2/vitl14.yaml --at 0 1 100000 300000 --plot schedules.png
  what becomes of a recipe in a shorter run:
    %(prog)s --config-file configs/dinov2/vitl14.yaml SOLVER.MAX_ITER 50000
"""
_PLOT_POINTS = 1000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = config_parser(_DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--at", nargs="+", default=[], metavar="ITER", help="iterations to print, from 0 (default: the turning points)"
    )
    parser.add_argument("--plot", default="", metavar="FILE.png", help="also draw the schedules (needs matplotlib)")
    args = parser.parse_args(argv)
    # --at takes every word that follows it; overrides begin with the first that is no number.
    num = next((i for i, word in enumerate(args.at) if not word.isdecimal()), len(args.at))
    args.at, args.opts = [int(word) for word in args.at[:num]], [*args.at[num:], *args.opts]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        cfg = read_cfg(args.config_file, args.opts)
        validate(cfg)
        if args.at and max(args.at) >= cfg.SOLVER.MAX_ITER:
            last = cfg.SOLVER.MAX_ITER - 1
            raise ValueError(
                f"--at {max(args.at)} is beyond the run, whose iterations are 0 to {last} (SOLVER.MAX_ITER)."
            )
        with torch.device("meta"):
            model = build_model(cfg)
        print_layers(cfg, model)
        print_schedules(cfg, model, args.at or turning_points(cfg))
        if args.plot:
            draw(cfg, model, args.plot, args.config_file)
        for warning in schedule_warnings(cfg, model):
            print(f"WARNING: {warning}")
    return 0


def print_layers(cfg: CfgNode, model: nn.Module) -> None:
    """The table of layers, with the LR each reaches at the peak."""
    solver = cfg.SOLVER
    peak = scaled_lr(solver.BASE_LR, solver.IMS_PER_BATCH, solver.REFERENCE_BATCH_SIZE, solver.LR_SCALING)
    rows = with_equal_blocks_together(layer_table(cfg, model))
    table = [
        (r.layer, f"{r.lr_mult:.5f}", f"{r.wd_mult:g}", f"{r.lr_mult * peak:.4e}", f"{r.num_params:,}") for r in rows
    ]
    table.append(("total", "", "", "", f"{sum(r.num_params for r in rows):,}"))
    headers = ("layer", "LR factor", "WD factor", "peak LR", "parameters")
    print(
        f"Batch {solver.IMS_PER_BATCH}, peak LR {peak:.4e} (SOLVER.BASE_LR {solver.BASE_LR:g}, {solver.LR_SCALING} scaling)"
    )
    print(tabulate(table, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4)))


def print_schedules(cfg: CfgNode, model: nn.Module, iterations: list[int]) -> None:
    """The table of schedules."""
    columns = schedule_values(cfg, model, iterations)
    table = {
        name: [f"{v:,}" if name == "iteration" else f"{v:.4e}" if name.endswith("lr") else f"{v:.6f}" for v in values]
        for name, values in columns.items()
    }
    print(f"\nSchedules of {cfg.SOLVER.MAX_ITER:,} iterations (LR before the factor of the layer)")
    print(tabulate(table, headers="keys", disable_numparse=True, colalign=["right"] * len(table)))


def draw(cfg: CfgNode, model: nn.Module, path: str, config_file: str) -> None:
    """The picture of ``--plot``."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The folder {folder} of --plot {path} does not exist; make it first.")
    total = cfg.SOLVER.MAX_ITER
    iterations = sorted({*turning_points(cfg), *range(0, total, max(1, total // _PLOT_POINTS))})
    marks = {"freeze ends": cfg.SOLVER.FREEZE_LAST_LAYER_ITERS, "warm-up ends": cfg.SOLVER.WARMUP_ITERS}
    inside = {text: iteration for text, iteration in marks.items() if 0 < iteration < total}
    title = f"{config_file or 'default config'}: batch {cfg.SOLVER.IMS_PER_BATCH:,}, {total:,} iterations"
    plot_schedules(schedule_values(cfg, model, iterations), path, title, inside)
    print(f"\nWrote {path}")


if __name__ == "__main__":
    run_tool(main)
