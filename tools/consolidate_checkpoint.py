#!/usr/bin/env python
"""Make one ordinary file of a sharded checkpoint (MODEL.PARALLEL fsdp), which every tool and every strategy reads.

    python tools/consolidate_checkpoint.py output/run/model_0009999.dcp output/whole/model_0009999.pth

It holds all of the folder: weights, moments, metric history, iteration. To go on from it, write its folder's file
last_checkpoint or use --fork-from. Tools read the folder as well; the file is for other programs, and to be copied.
"""

from __future__ import annotations

import argparse

from dinoengine.checkpoint.consolidate import consolidate
from dinoengine.engine import exit_on_user_error
from dinoengine.utils.console import run_tool
from dinoengine.utils.logger import setup_logger


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("input", metavar="IN", help="a folder model_*.dcp")
    parser.add_argument("output", metavar="OUT", help="a file, e.g. model.pth")
    args = parser.parse_args(argv)
    setup_logger()
    with exit_on_user_error():
        consolidate(args.input, args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    run_tool(main)
