#!/usr/bin/env python
"""Turn a training YAML of the published DINOv2 code into a dinoengine config; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os

from dinoengine.config.import_dinov2 import import_dinov2_config
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.file_writing import atomic_write

_DESCRIPTION = """
Turn a training YAML of the published DINOv2 code (keys dino, ibot, train, student, teacher, optim, crops ...) into a
dinoengine config. A file with differences only, as Meta ships them, is completed with the published defaults. Epochs
become iterations, the batch per GPU the global batch. Each key without a counterpart is printed with the reason.
"""

_EPILOG = """
Examples:

  the published long recipe, which ran on 96 GPUs:
    %(prog)s dinov2/configs/train/vitl14.yaml vitl14.yaml --num-gpus 96
  then see what it says, and train:
    python tools/show_config.py --config-file vitl14.yaml --changed
    python tools/train_net.py --config-file vitl14.yaml DATASETS.TRAIN folder:/path/to/images OUTPUT_DIR output/vitl14
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="META.yaml", help="YAML of the published code")
    parser.add_argument("target", metavar="OUT.yaml", help="dinoengine config to write")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=None,
        metavar="N",
        help="GPUs of the run that the YAML is for: global batch / N is its train.batch_size_per_gpu",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.yaml if it exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        if os.path.exists(args.target) and not args.overwrite:
            raise FileExistsError(f"{args.target} exists already; choose another name, or --overwrite it.")
        folder = os.path.dirname(os.path.abspath(args.target))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"The folder {folder} of {args.target} does not exist; make it first.")
        imported = import_dinov2_config(args.source, args.num_gpus)
        with atomic_write(args.target, "w") as file:
            file.write(imported.text)
    for key, reason in imported.dropped:
        print(f"no counterpart: {key} ({reason})")
    batch, iterations = imported.cfg.SOLVER.IMS_PER_BATCH, imported.cfg.SOLVER.MAX_ITER
    print(f"Wrote {args.target}: batch {batch:,} on {args.num_gpus} GPU(s), {iterations:,} iterations.")
    return 0


if __name__ == "__main__":
    run_tool(main)
