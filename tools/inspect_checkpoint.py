#!/usr/bin/env python
"""What is in weight files of any layout; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import sys

from dinoengine.checkpoint.layouts import LAYOUTS, Hints
from dinoengine.checkpoint.summary import Summary, render, summarize
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Show what is in weight files: layout, architecture, patch, registers, image size, heads, centres, student, iteration,
dtypes, entries that are missing or unused, and the config overrides that build the backbone. No model is built. Several
files stand side by side. A file that cannot be read is one line on stderr and exit code 2; the others are still shown.
"""

_EPILOG = """
Examples:

  a published file:
    %(prog)s dinov2_vits14_pretrain.pth
  what a conversion made of a checkpoint, side by side:
    %(prog)s output/run/model_final.pth output/vits14-hf
  a file whose position table is no square:
    %(prog)s --grid 16 32 wide.pth
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layouts = "\n".join(f"  {name:<13} {layout.description}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=f"{_EPILOG}\nlayouts:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, or a folder with model.safetensors")
    parser.add_argument(
        "--from", dest="layout", default="auto", choices=["auto", *LAYOUTS], help="default: by its keys"
    )
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, if not 64 channels each")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of a table that is no square")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    hints = Hints(args.num_heads, tuple(args.grid) if args.grid else None)
    summaries: dict[str, Summary] = {}
    num_failed = 0
    for path in args.files:
        try:
            summaries[path] = summarize(path, args.layout, hints)
        except (ValueError, KeyError, OSError) as error:
            num_failed += 1
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if summaries:
        print(render(summaries))
    return 2 if num_failed else 0


if __name__ == "__main__":
    run_tool(main)
