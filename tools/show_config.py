#!/usr/bin/env python
"""Print the merged config and what set each key; ``--help`` shows examples."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from dinoengine.config import CfgNode, get_cfg, key_origins, read_cfg, validate
from dinoengine.config.arguments import config_parser
from dinoengine.config.resume_rules import config_changes
from dinoengine.config.show import annotated_yaml
from dinoengine.data import build_test_loader, build_train_loader, describe_batch
from dinoengine.engine import exit_on_user_error
from dinoengine.solver import scale_config_to_world_size
from dinoengine.structures import ImageBatch, SSLBatch
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Print the config that a file (with the files it names under _BASE_) and overrides make together, as YAML that loads
back to it. The comment behind each key says what set it: a file, the command line, or the default.

With --inputs print instead the tensors that the config's loaders make, from one real batch.
"""

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE. Examples:

  everything, and where it comes from:
    %(prog)s --config-file configs/dinov2/vitg14.yaml SOLVER.MAX_ITER 1000
  what differs from the defaults:
    %(prog)s --config-file configs/dinov2/vitg14.yaml --changed
  the input tensors of one of 32 processes, without the data:
    %(prog)s --config-file configs/dinov2/vitl16_short.yaml --inputs --num-gpus 32 \\
        DATASETS.TRAIN synthetic:num_images=64 DATASETS.TEST synthetic:num_images=64
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = config_parser(_DESCRIPTION, _EPILOG)
    parser.add_argument("--changed", action="store_true", help="only the keys that differ from the defaults")
    parser.add_argument("--inputs", action="store_true", help="the input tensors, from a real batch of each loader")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="with --inputs: processes that share a batch (default: 1)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        cfg = read_cfg(args.config_file, args.opts)
        if args.inputs:
            print_inputs(cfg, args.num_gpus)
        else:
            origins = key_origins(cfg, args.config_file, args.opts)
            if args.changed:
                origins = {change.key: origins[change.key] for change in config_changes(get_cfg(), cfg)}
            print(annotated_yaml(cfg, origins), end="")
    return 0


def print_inputs(cfg: CfgNode, num_processes: int) -> None:
    """Load the first batch of process 0 for training, and of the first test dataset for evaluation, and print both."""
    if num_processes < 1:
        raise ValueError(f"--num-gpus must be 1 or more with --inputs, got {num_processes}.")
    cfg = scale_config_to_world_size(cfg, num_processes)
    validate(cfg, num_processes)
    cfg = cfg.clone()
    # One batch is loaded here, on the CPU; a seed that is still to be drawn (-1) does not change shapes.
    cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.DEVICE, cfg.SEED = 0, "cpu", max(0, cfg.SEED)
    try:
        train_loader = build_train_loader(cfg, rank=0, world_size=num_processes)
        test_loader = build_test_loader(cfg, cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} The table is read from a real batch; without the data at hand, add DATASETS.TRAIN "
            "synthetic:num_images=64 DATASETS.TEST synthetic:num_images=64 to see the same shapes."
        ) from None
    share = cfg.SOLVER.IMS_PER_BATCH // num_processes
    print(f"Training, process 1 of {num_processes}: {share} of the {cfg.SOLVER.IMS_PER_BATCH} images of a batch")
    _print_table(next(iter(train_loader)).to("cpu"))  # its crops are made there if the device is to make them
    if test_loader is None:
        print("\nEvaluation: no dataset (DATASETS.TEST is empty)")
    else:
        print(f"\nEvaluation of {cfg.DATASETS.TEST[0]}, one process")
        _print_table(next(iter(test_loader)))


def _print_table(batch: SSLBatch | ImageBatch) -> None:
    print(tabulate(describe_batch(batch), headers=["name", "shape", "dtype", "meaning"]))


if __name__ == "__main__":
    run_tool(main)
