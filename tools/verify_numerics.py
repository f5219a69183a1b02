#!/usr/bin/env python
"""Compare what this installation computes with the figures of the published DINOv2 training."""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from dinoengine.evaluation.numerics.checks import CHECKS, run_checks
from dinoengine.evaluation.numerics.quantity import quantities_table
from dinoengine.utils.console import run_tool

_DESCRIPTION = f"""
Prints a table of quantities: expected, got, tolerance, verdict, and where the expected figure comes from (a published
file or recipe, a formula, a plain loop). Needs neither a network nor a GPU; some seconds on one core.

Checks: {", ".join(CHECKS)}. The last two compare the backbone with timm and transformers and say
"not installed" where these are missing, which is no failure.

Exit code: 0 if nothing fails, 1 if a quantity does, 2 for a wrong argument.
"""
_EPILOG = """
examples:
  everything:                      %(prog)s
  after a change in the losses:    %(prog)s weights targets losses
"""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="run only these (default: all)")
    args = parser.parse_args(words)
    torch.set_num_threads(1)  # tiny tensors
    try:
        quantities = run_checks(args.checks or None)
    except ValueError as error:
        parser.error(str(error))
    print(quantities_table(quantities))
    verdicts = Counter(q.verdict for q in quantities)
    print(f"\n{len(quantities)} quantities: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return 1 if verdicts["FAIL"] else 0


if __name__ == "__main__":
    run_tool(main)
