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

from dinoengine.checkpoint.arguments import (
    layout_table,
    reading_arguments,
    reading_options,
    writing_arguments,
    writing_options,
)
from dinoengine.checkpoint.convert import convert
from dinoengine.checkpoint.layouts import LAYOUTS
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{layout_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[reading_arguments(), writing_arguments()],
    )
    parser.add_argument("--to", required=True, choices=list(LAYOUTS))
    parser.add_argument("--block-chunks", type=int, default=0, metavar="N", help="chunks to write (Meta's layouts)")
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    args = parser.parse_intermixed_args()
    setup_logger()
    with exit_on_user_error():
        convert(
            args.input,
            args.output,
            args.to,
            block_chunks=args.block_chunks,
            **reading_options(args),
            **writing_options(args),
        )


if __name__ == "__main__":
    run_tool(main)
