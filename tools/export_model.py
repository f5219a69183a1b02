#!/usr/bin/env python
"""Export a backbone at one image size to ONNX or torch.export; ``--help`` shows examples."""

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
from dinoengine.checkpoint.export import EXPORTERS, export_backbone
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger

_DESCRIPTION = """
Write the (teacher's) backbone for images of one size, any number at a time. The position table is interpolated here, once;
the graph holds none of it. The input is "images", normalised float32 [B, C, H, W]: (pixels / 255 - mean) / std, with the
mean and std of the config in the file's metadata where IN has a config. Outputs: "cls_token" [B, D], "register_tokens"
[B, R, D] if there are registers, "patch_tokens" [B, N, D]. The file is run against the model before it is kept.

  onnx          run with onnxruntime; needs pip install 'dinoengine[onnx]'. Beyond 2 GB the weights lie in OUT.data
  torch-export  torch.export.load(OUT).module()(images)
"""

_EPILOG = """
Examples:

  published weights at 224 x 224:
    %(prog)s --to onnx dinov2_vits14_pretrain.pth vits14.onnx --img-size 224
  the teacher of a run, at a wide size:
    %(prog)s --to torch-export output/run/model_final.pth vits16.pt2 --img-size 224 448
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --to {onnx,torch-export} IN OUT [options]",
        description=_DESCRIPTION,
        epilog=f"{_EPILOG}\n{layout_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[reading_arguments(), writing_arguments()],
    )
    parser.add_argument("input", metavar="IN", help="weights of any layout")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument("--to", required=True, choices=list(EXPORTERS))
    add_img_size(parser, "pixels; one: square (default: as in IN)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logger()
    with exit_on_user_error():
        export_backbone(
            args.input,
            args.output,
            args.to,
            img_size=args.img_size,
            **reading_options(args),
            **writing_options(args),
        )
    return 0


if __name__ == "__main__":
    run_tool(main)
