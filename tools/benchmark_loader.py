#!/usr/bin/env python
"""Find out what holds the training loader up; ``--help`` shows examples."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from dinoengine.config import read_cfg, validate
from dinoengine.config.arguments import config_parser
from dinoengine.data.dataset_check import cores
from dinoengine.data.loader_advice import Situation, advise, expected_rate, rows_of
from dinoengine.data.loader_timing import loader_rate, time_stages
from dinoengine.engine import exit_on_user_error
from dinoengine.engine.config_loading import resolve_device
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Time each stage of a config's training loader in one process (read from storage, decode, augment, collate, on a GPU also
the copy to it), then the loader as a whole with its workers, and say what to change.

The rate that the device takes is the images/s of a training whose data time is about 0 (columns of its log), or what
benchmarks/train_step.py prints for the model alone.
"""

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE. Examples:

  is this loader fast enough for a GPU that takes 900 images/s?
    %(prog)s --config-file cfg.yaml --images-per-second 900 DATASETS.TRAIN folder:/data/photos
  the same on a machine where 8 processes share the cores and the batch:
    %(prog)s --config-file cfg.yaml --images-per-second 900 --num-gpus 8
  with more workers and the fast augmentation:
    %(prog)s --config-file cfg.yaml DATALOADER.NUM_WORKERS 12 INPUT.AUGMENTATION_BACKEND fast
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = config_parser(_DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--images-per-second", type=float, default=0.0, metavar="RATE", help="what the device of one process takes"
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the batch and the cores; one of them is measured (default: 1)",
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="images to time stages on (default: 64)")
    parser.add_argument(
        "--batches", type=int, default=16, metavar="N", help="batches to time the whole loader on (default: 16)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        if min(args.num_gpus, args.images, args.batches) < 1 or args.images_per_second < 0:
            raise ValueError("--num-gpus, --images and --batches are 1 or more, --images-per-second 0 or more.")
        cfg = read_cfg(args.config_file, args.opts)
        cfg.SEED = max(0, cfg.SEED)  # -1 is drawn by a training; here any will do
        if cfg.MODEL.DEVICE == "auto":
            cfg.MODEL.DEVICE = resolve_device("auto", None)[0]
        validate(cfg, args.num_gpus)
        times = time_stages(cfg, args.images, args.num_gpus)
        measured = loader_rate(cfg, args.batches, args.num_gpus)
    crops = (*cfg.INPUT.GLOBAL_CROPS.SIZE_PX, *cfg.INPUT.LOCAL_CROPS.SIZE_PX)
    situation = Situation(
        measured, args.images_per_second, cfg.DATALOADER.NUM_WORKERS, args.num_gpus, cores(), max(crops)
    )
    print(
        tabulate(rows_of(times), headers=["stage alone", "ms/image", "images/s", "share"], floatfmt=("", ".2f", ".0f"))
    )
    print(
        f"\nOne worker: {1 / times.worker_seconds:.0f} images/s. {cfg.DATALOADER.NUM_WORKERS} worker(s) on {cores()} "
        f"core(s): {expected_rate(times, situation):.0f} images/s if nothing holds them up.\n"
        f"The loader as a whole: {measured:.0f} images/s.\n"
    )
    print("\n".join(advise(times, situation)))
    return 0


if __name__ == "__main__":
    run_tool(main)
