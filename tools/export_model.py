#!/usr/bin/env python
"""Export a backbone at one image size to ONNX or torch.export; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import sys

from dinoengine.checkpoint.export import EXPORTERS, export_backbone
from dinoengine.checkpoint.layouts import LAYOUTS, Hints
from dinoengine.engine import exit_on_user_error
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
    layouts = "\n".join(f"  {name:<13} {layout.description}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s --to {onnx,torch-export} IN OUT [options]",
        description=_DESCRIPTION,
        epilog=f"{_EPILOG}\nlayouts of IN:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN", help="weights of any layout")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument("--to", required=True, choices=list(EXPORTERS))
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar=("H", "W"), help="pixels; one: square (default: as in IN)"
    )
    parser.add_argument(
        "--from", dest="layout", default="auto", choices=["auto", *LAYOUTS], help="default: by its keys"
    )
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="entries that may be missing or unused",
    )
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, if not 64 channels each")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of a table that is no square")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if args.img_size and len(args.img_size) > 2:
        parser.error(f"--img-size takes one or two numbers; got {len(args.img_size)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logger()
    with exit_on_user_error():
        export_backbone(
            args.input,
            args.output,
            args.to,
            img_size=(args.img_size[0], args.img_size[-1]) if args.img_size else None,
            layout=args.layout,
            allow=args.allow,
            hints=Hints(args.num_heads, tuple(args.grid) if args.grid else None),
            overwrite=args.overwrite,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
