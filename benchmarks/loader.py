#!/usr/bin/env python
"""Images per second of the training loader alone: decode, multi-crop, masks, collate.

    python benchmarks/loader.py                              # generated 500 x 375 JPEGs, 2 x 224 + 8 x 96, one process
    python benchmarks/loader.py DATALOADER.NUM_WORKERS 2 DATASETS.TRAIN folder:/path/to/images

Prints the rate with the exact setting.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dinoengine.config import get_cfg
from dinoengine.data import Synthetic, build_train_loader
from dinoengine.utils.env import collect_env_info

NUM_FILES = 64


def write_jpegs(folder: Path) -> None:
    """500 x 375 JPEGs (quality 90) of procedural images with noise, about the size of photographs."""
    source = Synthetic(num_images=NUM_FILES, size=500)
    for i in range(NUM_FILES):
        Image.fromarray(np.ascontiguousarray(source.render(i)[:375])).save(folder / f"{i:03d}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batches", type=int, default=16, help="timed batches, after those that the workers prefetched"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = get_cfg()
        cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 16, "DATALOADER.NUM_WORKERS", 0, *args.opts])
        if not cfg.DATASETS.TRAIN:
            write_jpegs(Path(folder))
            cfg.DATASETS.TRAIN = (f"folder:{folder}",)
        batches = iter(build_train_loader(cfg))
        # Workers fill their queues ahead of the clock: the batches that wait there are not timed.
        untimed = 2 + cfg.DATALOADER.NUM_WORKERS * cfg.DATALOADER.PREFETCH_FACTOR
        for _ in range(untimed):
            next(batches)
        seconds = []
        for _ in range(args.batches):
            start = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - start)
        del batches
    print(collect_env_info())
    print(
        f"setting: {cfg.DATALOADER.NUM_WORKERS} workers, batch {cfg.SOLVER.IMS_PER_BATCH}, 2 x "
        f"{cfg.INPUT.GLOBAL_CROPS.SIZE_PX} + {cfg.INPUT.LOCAL_CROPS.NUM} x {cfg.INPUT.LOCAL_CROPS.SIZE_PX}"
    )
    mean = statistics.fmean(seconds)  # with workers single times say little: batches come in bunches
    print(
        f"{cfg.SOLVER.IMS_PER_BATCH / mean:.1f} images/s  (mean of {args.batches} batches after {untimed} untimed: "
        f"{mean:.3f} s, {min(seconds):.3f} to {max(seconds):.3f})"
    )


if __name__ == "__main__":
    main()
