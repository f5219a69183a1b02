#!/usr/bin/env python
"""Look at every image of a dataset before it costs days of training; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os

from tabulate import tabulate
from tqdm import tqdm

from dinoengine.config import CfgNode, read_cfg
from dinoengine.config.pixels import ANY_CHANNELS
from dinoengine.data import ImageDataset, build_dataset
from dinoengine.data.channels import Channels, image_format
from dinoengine.data.check_report import NOT_SHOWN, Page, is_shown, pixel_statistics, render_page
from dinoengine.data.dataset_check import Inspected, cores, find_duplicates, find_leaks, inspect_dataset
from dinoengine.data.dataset_findings import (
    BAD,
    LEAKS,
    NAMES,
    Limits,
    findings_of,
    require_new,
    save_manifest,
    save_quarantine,
)
from dinoengine.data.decode import MAX_IMAGE_PIXELS
from dinoengine.data.folder_scan import ARRAY_EXTENSIONS
from dinoengine.data.loader_advice import Situation, advise, expected_rate
from dinoengine.data.loader_timing import time_stages
from dinoengine.data.quarantine import without_quarantined
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.file_writing import atomic_write
from dinoengine.utils.printable import printable

_DESCRIPTION = """
Read every image of a dataset with several processes and write into a folder

  report.html      one page: findings, sizes, pixel mean and std, speed, pictures of what looks alike
  manifest.csv     a row per image: size, mode, hashes, groups, or why it cannot be read; list:DIR/manifest.csv is a
                   dataset of the images where they are files, not members of shards
  quarantine.txt   images to leave out, for DATASETS.QUARANTINE

It finds images that are damaged, empty, tiny, huge or blank, exact and near duplicates, and with --against images that a
second dataset has as well. docs/data.md says what counts as what. Arrays (.npy, TIFF of many channels) need the config that
says their channels: INPUT.FORMAT channels, INPUT.VALUE_RANGE, MODEL.PIXEL_MEAN of as many values.
"""

_EPILOG = """
Examples:

  %(prog)s folder:/data/photos --output checks/photos
  a training set and the test set that it must not hold:
    %(prog)s folder:/data/train --against folder:/data/val --output checks/train
  does the loader of this config keep up with a GPU that takes 900 images/s?
    %(prog)s folder:/data/photos --output checks/photos --config-file cfg.yaml --images-per-second 900
  leave out copies as well, then train:
    %(prog)s folder:/data/photos --output checks/photos --quarantine bad,duplicates,near-duplicates
    tools/train_net.py --config-file cfg.yaml DATASETS.QUARANTINE "('checks/photos/quarantine.txt',)"
"""

_NUM_TIMED = 32


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a dataset string, see docs/data.md")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the three files; may not hold them")
    parser.add_argument("--against", default="", metavar="OTHER", help="a dataset whose images must not be in DATASET")
    parser.add_argument(
        "--quarantine",
        default=f"{BAD},{LEAKS}",
        metavar="NAMES",
        help=f"findings whose images go into quarantine.txt, of {', '.join(NAMES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        metavar="N",
        help="processes; 0: none besides this (default: %(default)s)",
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=4,
        metavar="BITS",
        help="of 64 bits of two perceptual hashes that may differ in near duplicates, 0 to 6 (default: 4)",
    )
    parser.add_argument(
        "--min-side", type=int, default=32, metavar="PX", help="shorter side below it: tiny (default: 32)"
    )
    parser.add_argument(
        "--max-megapixels", type=float, default=50.0, metavar="MP", help="more: huge (default: %(default)s)"
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="more are not decoded but bad, as DATALOADER.MAX_IMAGE_PIXELS says (default: %(default)s)",
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="of the loader whose speed is estimated; of the channels of arrays",
    )
    parser.add_argument(
        "--images-per-second", type=float, default=0.0, metavar="RATE", help="what the device takes, to compare with"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error(ValueError, KeyError, OSError, RuntimeError):
        check(args)
    return 0


def check(args: argparse.Namespace) -> None:
    """Inspect, compare, write the three files, and print what was found."""
    quarantined = [name for name in args.quarantine.split(",") if name]
    if unknown := [name for name in quarantined if name not in NAMES]:
        raise ValueError(f"--quarantine knows {', '.join(NAMES)}; got {unknown[0]!r}.")
    page_file, manifest, quarantine = require_new(args.output, "report.html", "manifest.csv", "quarantine.txt")
    cfg = read_cfg(args.config_file)
    dataset = build_dataset(args.dataset)
    other_set = build_dataset(args.against) if args.against else None  # a wrong string is found before the work
    channels = _channels_of(cfg, dataset)
    inspected = _inspect(dataset, args.dataset, args, channels)
    other = None if other_set is None else _inspect(other_set, args.against, args, channels)
    duplicates = find_duplicates(inspected, args.distance)
    leaks = None if other is None else find_leaks(inspected, other, args.distance)
    found = findings_of(inspected, duplicates, leaks, Limits(args.min_side, int(args.max_megapixels * 1e6)))
    save_manifest(manifest, inspected, duplicates, leaks, other)
    unlisted = save_quarantine(quarantine, inspected, found, quarantined)
    page = Page(args.dataset, args.against, _speed(cfg, args, inspected, quarantine), quarantined)
    with atomic_write(page_file, "w") as file:
        file.write(render_page(page, inspected, found, duplicates, leaks, other))
    rows = [
        (f.name, len(f.indices), "yes" if f.name in quarantined and len(f.indices) else "", f.meaning) for f in found
    ]
    print(tabulate(rows, headers=["finding", "images", "quarantine", "meaning"], maxcolwidths=[None, None, None, 70]))
    print(f"\n{inspected.num_good} of {len(dataset)} images can be read. Of these:\n{pixel_statistics(inspected)}\n")
    print("\n".join(page.speed))
    if not is_shown(inspected):
        print(f"\n{NOT_SHOWN}")
    if unlisted:
        print(f"\n{len(unlisted)} name(s) cannot be in a list, because of line breaks or a leading #: {unlisted[0]!r}")
    if dataset.path(0) is None:
        print(
            f"\nThe images are no files of their own, so {manifest} is a table to read, and list: does not take it. Train "
            "on the dataset itself, and leave images out by DATASETS.QUARANTINE."
        )
    print(f"\nWritten: {page_file}, {manifest}, {quarantine}")


def _channels_of(cfg: CfgNode, dataset: ImageDataset) -> Channels | None:
    """What the images are for a config of arrays; None: pictures."""
    wanted = image_format(cfg)
    if not isinstance(wanted, Channels):
        if (first := dataset.describe(0)).lower().endswith(tuple(ARRAY_EXTENSIONS)):
            raise ValueError(
                f"The first image, {first}, is an array. Give a --config-file with INPUT.FORMAT {ANY_CHANNELS}, its "
                "INPUT.VALUE_RANGE, and MODEL.PIXEL_MEAN with as many values, whatever they are, as there are channels."
            )
        return None
    if len(wanted.value_range) != 2:
        raise ValueError(f"INPUT.FORMAT {ANY_CHANNELS} needs INPUT.VALUE_RANGE, the stored values that are 0 and 1.")
    return wanted


def _inspect(dataset: ImageDataset, name: str, args: argparse.Namespace, channels: Channels | None) -> Inspected:
    dataset.limit_pixels(args.max_image_pixels)
    dataset.load_channels(0 if channels is None else channels.count)
    with tqdm(total=len(dataset), unit=" images", desc=printable(name)) as bar:
        return inspect_dataset(dataset, args.workers, bar.update, channels)


def _speed(cfg: CfgNode, args: argparse.Namespace, inspected: Inspected, quarantine: str) -> list[str]:
    """Lines about decoding, and about the loader of a config on the images that are not in quarantine."""
    if not inspected.num_good:
        return ["No image can be read."]
    decode = inspected.decode_seconds
    lines = [
        f"decoding: {1000 * decode:.2f} ms per image, {1 / decode:.0f} images/s per process ({args.workers} at once)"
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.QUARANTINE = (args.dataset,), (quarantine,)
    cfg.DATASETS.TRAIN_WEIGHTS = ()
    cfg.DATALOADER.SAMPLER, cfg.DATALOADER.SAMPLE_WEIGHTS = "uniform", ""
    cfg.SEED, cfg.MODEL.DEVICE = max(0, cfg.SEED), "cpu"
    try:
        without_quarantined(inspected.dataset, (quarantine,))
    except ValueError:
        return [*lines, "The loader was not timed: all images are in quarantine."]
    times = time_stages(cfg, min(_NUM_TIMED, inspected.num_good))
    workers = cfg.DATALOADER.NUM_WORKERS
    situation = Situation(0.0, args.images_per_second, workers, 1, cores(), max(cfg.INPUT.GLOBAL_CROPS.SIZE_PX))
    situation = situation._replace(measured=expected_rate(times, situation))
    which = os.path.basename(args.config_file) or "the default config"
    lines.append(
        f"loader of {which}, estimated from {times.num_images} images: {1 / times.worker_seconds:.0f} images/s per worker, "
        f"{situation.measured:.0f} with {workers} worker(s) on {cores()} core(s)"
    )
    return lines + (advise(times, situation) if args.images_per_second else [])


if __name__ == "__main__":
    run_tool(main)
