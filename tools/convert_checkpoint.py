#!/usr/bin/env python
"""Convert weights between layouts; every entry is accounted for, and the result is run against the source.

    python tools/convert_checkpoint.py --to huggingface dinov2_vits14_pretrain.pth output/vits14-hf
    python tools/convert_checkpoint.py --to timm --allow 'dino_head.*' output/run/model_final.pth vits14-timm.pth
    python tools/convert_checkpoint.py --from cerebras --to dinoengine checkpoint.mdl weights.pth
    python tools/convert_checkpoint.py --to meta-teacher --block-chunks 4 weights.pth teacher_checkpoint.pth

IN may be a file or a folder with config.json and model.safetensors; OUT is a file, for huggingface a folder.
"""

from __future__ import annotations

import argparse

from dinoengine.checkpoint.convert import convert
from dinoengine.checkpoint.layouts import LAYOUTS, Hints
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.logger import setup_logger


def main() -> None:
    layouts = "\n".join(f"  {name:<13} {layout.description}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nlayouts:\n{layouts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="layout", default="auto", choices=["auto", *LAYOUTS], help="default: by its keys"
    )
    parser.add_argument("--to", required=True, choices=list(LAYOUTS))
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="entries that may be missing, or be left out where the layout has no place for them, e.g. 'dino_head.*'",
    )
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, if not 64 channels each")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of a table that is no square")
    parser.add_argument("--block-chunks", type=int, default=0, metavar="N", help="chunks to write (Meta's layouts)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    args = parser.parse_intermixed_args()
    setup_logger()
    with exit_on_user_error():
        convert(
            args.input,
            args.output,
            args.to,
            layout=args.layout,
            allow=args.allow,
            hints=Hints(args.num_heads, tuple(args.grid) if args.grid else None),
            block_chunks=args.block_chunks,
            overwrite=args.overwrite,
        )


if __name__ == "__main__":
    main()
