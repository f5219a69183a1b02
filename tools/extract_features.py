#!/usr/bin/env python
"""Features of a dataset as memory-mapped arrays; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os
from typing import Any

# Before torch: threads that wait must sleep, not spin; see tools/train_net.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from dinoengine.checkpoint import evaluation_config, feature_model
from dinoengine.checkpoint.arguments import layout_table, reading_arguments, reading_options, writing_arguments
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.engine import exit_on_user_error, launch
from dinoengine.engine.config_loading import resolve_device
from dinoengine.engine.torchrun import process_rank
from dinoengine.evaluation import Extraction, extract_to_store
from dinoengine.evaluation.extraction import DTYPES, TOKENS
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger

_DESCRIPTION = """
Run the (teacher's) backbone over every image of a dataset and write the folder OUT: an array <token>.npy for each kind of
token, one row per image in the order of the dataset; index.jsonl with name, label and class of each row; meta.json with
the weights' hash, dataset and preprocessing. The rows are the same for any number of processes.

A run that was interrupted continues when the command is given again, also with other processes and batches; with other
settings it is refused. Until all rows are there the folder is called OUT.unfinished.

  cls         the CLS token            [images, n * D]     (n = --num-last-blocks, side by side, each after the final norm)
  mean_patch  the mean patch token     [images, n * D]
  patch       all patch tokens         [images, patches, n * D]
  register    the register tokens      [images, registers, n * D]

Read them with dinoengine.evaluation.FeatureStore(OUT), or numpy.load(OUT/cls.npy, mmap_mode="r").
"""

_EPILOG = """
Examples:

  CLS tokens by published weights:
    %(prog)s --weights dinov2_vits14_pretrain.pth folder:/path/to/val features/val
  what a linear probe on four blocks reads, in half the space, on 4 GPUs:
    %(prog)s --weights output/run/model_final.pth --tokens cls,mean_patch --num-last-blocks 4 --dtype float16 \\
        --num-processes 4 folder:/path/to/train features/train
  on the CPU, under torchrun:
    torchrun --nproc-per-node 2 %(prog)s --device cpu --weights vits16-hf digits:split=test features/digits
  weights that no config comes with, trained in other pixel statistics than ImageNet's:
    %(prog)s --weights foreign.pth --pixel-mean 0.5,0.5,0.5 --pixel-std 0.5,0.5,0.5 folder:/path/to/val features/val
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --weights W DATASET OUT [options]",
        description=_DESCRIPTION,
        epilog=f"{_EPILOG}\n{layout_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[reading_arguments(), writing_arguments()],
    )
    parser.add_argument("dataset", metavar="DATASET", help="dataset string, e.g. folder:/path")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--weights", required=True, metavar="W", help="weights of any layout")
    parser.add_argument("--tokens", default="cls", metavar="A,B", help=f"any of {', '.join(TOKENS)} (default: cls)")
    parser.add_argument("--num-last-blocks", type=int, default=1, metavar="N", help="default: 1, the last")
    parser.add_argument("--normalize", action="store_true", help="give each row (each token) length 1")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the arrays (default: float32)")
    parser.add_argument("--resize", type=int, metavar="PX", help="shorter side before the crop; 0 leaves the size")
    parser.add_argument(
        "--crop",
        type=int,
        metavar="PX",
        help="edge of the centre crop (default of both: W's config, else as published)",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--pixel-{name}",
            type=_numbers,
            metavar="A,B,C",
            help=f"{name} of each channel, for pixels in 0..1 (default: of W's config, else ImageNet's)",
        )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="over all processes (default: 64)")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes for each process")
    parser.add_argument("--num-processes", type=int, metavar="N", help="on a GPU one each (default: 1)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--parquet", action="store_true", help="index.parquet as well; needs pyarrow")
    args = parser.parse_args(argv)
    least = {"batch_size": 1, "num_last_blocks": 1, "crop": 1, "num_processes": 1, "resize": 0, "num_workers": 0}
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            parser.error(f"--{name.replace('_', '-')} must be {smallest} or more; got {value}")
    return args


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def extract(args: argparse.Namespace, device: str) -> None:
    """What each process does."""
    setup_logger(distributed_rank=process_rank())
    options: dict[str, Any] = reading_options(args)
    with exit_on_user_error():
        extraction = Extraction(tuple(args.tokens.split(",")), args.num_last_blocks, args.normalize, args.dtype)
        weights = read_weights(args.weights, options["layout"], options["hints"])
        weights.require_complete(args.weights, args.allow)
        cfg = evaluation_config(weights, args.weights, args.pixel_mean, args.pixel_std)
        cfg.MODEL.DEVICE = device
        cfg.TEST.IMS_PER_BATCH = args.batch_size
        cfg.DATALOADER.NUM_WORKERS = args.num_workers
        if args.resize is not None:
            cfg.INPUT.TEST.RESIZE_PX = args.resize
        if args.crop is not None:
            cfg.INPUT.TEST.CROP_SIZE_PX = (args.crop,)
        extract_to_store(
            feature_model(weights, cfg).to(device),
            cfg,
            args.dataset,
            args.output,
            extraction,
            weights_file=args.weights,
            overwrite=args.overwrite,
            parquet=args.parquet,
            show_progress=True,
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        # resolve_device counts GPUs; on a machine without any the processes are on the CPU.
        device = "cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device
        device, num_processes = resolve_device(device, args.num_processes)
    launch(extract, num_processes, args=(args, device), device=device)
    return 0


if __name__ == "__main__":
    run_tool(main)
