#!/usr/bin/env python
"""Another image size, patch size, number of channels or of registers for given weights; ``--help`` shows examples."""

from __future__ import annotations

import argparse

from dinoengine.checkpoint.arguments import (
    add_img_size,
    layout_table,
    reading_arguments,
    reading_options,
    writing_arguments,
    writing_options,
)
from dinoengine.checkpoint.layouts import LAYOUTS
from dinoengine.checkpoint.resize import Target, resize_checkpoint
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger

_DESCRIPTION = """
Write weights for another image size, patch size, number of input channels or of register tokens. IN may be of any layout
that convert_checkpoint.py reads; teacher and student change alike, heads and centres are kept, the optimizer's state is
left out. Each entry that changes is printed, and both models are run and compared before OUT is written:

  image size   the position table is interpolated as the model itself does at that size, so the outputs are equal
  patch size   the patch embedding is resampled by the pseudo-inverse method of FlexiViT (arXiv:2212.08013): where the
               patch grows, images with each patch upsampled give the same outputs; where it shrinks, the nearest there
               is. The image size stays, so the number of positions changes, unless --img-size is given
  channels     an image of as many channels as the smaller of both numbers gives the same outputs when each model sees
               its channels repeated cyclically; so does a grey image. For 3 -> 1 the kernels of the channels are added
  registers    new ones start near zero; they change the outputs (printed) until they are trained
"""

_EPILOG = """
Examples:

  published weights for training at 224 x 224, and for a wide camera:
    %(prog)s dinov2_vits14_pretrain.pth vits14-224.pth --img-size 224
    %(prog)s dinov2_vits14_pretrain.pth wide.pth --img-size 224 448 --to dinoengine
  patch 14 becomes 16, with the 37 x 37 positions kept:
    %(prog)s dinov2_vitb14_pretrain.pth vitb16.pth --patch-size 16 --img-size 592
  grey images, and four registers:
    %(prog)s output/run/model_final.pth grey.pth --in-chans 1 --num-registers 4
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s IN OUT [options]",
        description=_DESCRIPTION,
        epilog=f"{_EPILOG}\n{layout_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[reading_arguments(), writing_arguments()],
    )
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT", help="a file, for huggingface a folder")
    add_img_size(parser, "pixels of the position table; one: square")
    parser.add_argument("--patch-size", type=int, metavar="P", help="edge in pixels")
    parser.add_argument("--in-chans", type=int, metavar="C", help="channels of the images")
    parser.add_argument("--num-registers", type=int, metavar="R", help="how many there shall be, with those there are")
    parser.add_argument("--to", choices=list(LAYOUTS), help="layout of OUT (default: that of IN)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logger()
    with exit_on_user_error():
        resize_checkpoint(
            args.input,
            args.output,
            Target(
                img_size=args.img_size,
                patch_size=args.patch_size,
                in_chans=args.in_chans,
                num_registers=args.num_registers,
            ),
            to=args.to,
            **reading_options(args),
            **writing_options(args),
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
