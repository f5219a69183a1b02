#!/usr/bin/env python
"""Records of evaluations side by side; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from dinoengine.evaluation.comparison import read_record, render
from dinoengine.evaluation.linear import HEADS_FILE
from dinoengine.utils.console import run_tool
from dinoengine.utils.printable import printable

_DESCRIPTION = """
Show the records that evaluations leave in OUTPUT_DIR/eval. Those with the same dataset, number of images, protocol and
preprocessing share a table: a row per weights or iteration, a column per metric. Of other groups it is said in what they
differ from the first, as their numbers must not be compared. A file that is no record is one line on stderr and exit code
2; the others are still shown.
"""

_EPILOG = """
Examples:

  the course of a run:
    %(prog)s output/digits/eval/*.json
  two runs:
    %(prog)s output/first/eval/iter_0001200-*.json output/second/eval/iter_0001200-*.json
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a record, OUTPUT_DIR/eval/*.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    records: dict[str, Any] = {}
    num_failed = 0
    for path in args.files:
        if os.path.basename(path).startswith(HEADS_FILE):
            continue  # lies beside the records, so eval/*.json finds it as well
        try:
            records[path] = read_record(path)
        except (ValueError, OSError) as error:
            num_failed += 1
            print(f"error: {printable(str(error))}", file=sys.stderr)
    if records:
        print(render(records))
    return 2 if num_failed else 0


if __name__ == "__main__":
    run_tool(main)
