#!/usr/bin/env python
"""What is in weight files of any layout; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import sys

from dinoengine.checkpoint.arguments import layout_table, reading_arguments, reading_options
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
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=f"{_EPILOG}\n{layout_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[reading_arguments()],
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, or a folder with model.safetensors")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    summaries: dict[str, Summary] = {}
    errors: list[str] = []
    for path in args.files:
        try:
            summaries[path] = summarize(path, **reading_options(args))
        except (ValueError, KeyError, OSError) as error:
            errors.append(f"error: {' '.join(str(error).split())}")
    if summaries:
        print(render(summaries), flush=True)
    for line in errors:  # last, where a terminal shows them
        print(line, file=sys.stderr)
    return 2 if errors else 0


if __name__ == "__main__":
    run_tool(main)
