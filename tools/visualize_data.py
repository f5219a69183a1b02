#!/usr/bin/env python
"""Contact sheets of crops, masks and augmentations of a config; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os

from dinoengine.config import read_cfg, validate
from dinoengine.config.arguments import config_parser
from dinoengine.engine import exit_on_user_error
from dinoengine.engine.visualization import make_sheets
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger

_DESCRIPTION = """
Write what a model of this config sees as pictures (PNG): the first images of the run, with the crops and masks that the
same command to tools/train_net.py would train on.

  crops.png        the images with the place of each crop, and all crops
  masks.png        the global crops with the patches that the student does not see
  operations.png   crop, flip and each colour operation alone, over its range
  channels.png     each channel alone (INPUT.FORMAT channels)
  evaluation.png   the evaluation crop of images of the first dataset in DATASETS.TEST, with the classes of its masks

Pixels are normalised as the model does it and the normalisation is undone; crops.png says mean and deviation between.
Channels that are no colours are stretched and get a colour each, which the sheet names.
"""

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE. Examples:

  the quickstart:
    %(prog)s --config-file configs/quickstart/digits.yaml --output sheets
  the published recipe on your images, with the fast backend:
    %(prog)s --config-file configs/dinov2/vitl16_short.yaml --images 4 DATASETS.TRAIN folder:/path/to/images \\
        INPUT.AUGMENTATION_BACKEND fast
  16 bit images with 2 channels:
    %(prog)s --config-file cfg.yaml INPUT.FORMAT channels INPUT.VALUE_RANGE "(0, 65535)" \\
        MODEL.PIXEL_MEAN "(0.1, 0.2)" MODEL.PIXEL_STD "(0.1, 0.1)"
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = config_parser(_DESCRIPTION, _EPILOG)
    parser.add_argument("--output", metavar="DIR", help="folder to write (default: OUTPUT_DIR/sheets)")
    parser.add_argument("--images", type=int, default=6, metavar="N", help="images on a sheet (default: 6)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logger()
    with exit_on_user_error():
        cfg = read_cfg(args.config_file, args.opts)
        validate(cfg)
        # What is looked at are images, on the CPU; a seed that is still to be drawn (-1) may be any.
        cfg.MODEL.DEVICE, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = "cpu", max(0, cfg.SEED), 0
        folder = args.output or os.path.join(cfg.OUTPUT_DIR, "sheets")
        sheets = make_sheets(cfg, args.images)
        os.makedirs(folder, exist_ok=True)
        for name, sheet in sheets.items():
            path = os.path.join(folder, f"{name}.png")
            sheet.save(path)
            print(f"{path}  {sheet.width} x {sheet.height}")
    return 0


if __name__ == "__main__":
    run_tool(main)
