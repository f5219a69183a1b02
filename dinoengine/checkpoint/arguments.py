"""Command-line arguments of the tools that read weights, and of those that write some in their place."""

from __future__ import annotations

import argparse
from typing import Any

from dinoengine.checkpoint.layouts import LAYOUTS, Hints


def reading_arguments() -> argparse.ArgumentParser:
    """A parent parser for every tool that reads weights; ``reading_options`` hands on what was given."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--from",
        dest="layout",
        default="auto",
        choices=["auto", *LAYOUTS],
        help="layout of what is read (default: by its keys)",
    )
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, if not 64 channels each")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of a table that is no square")
    return parser


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """``layout`` and ``hints`` as the functions behind the tools take them."""
    return {"layout": args.layout, "hints": Hints(args.num_heads, tuple(args.grid) if args.grid else None)}


def writing_arguments() -> argparse.ArgumentParser:
    """As ``reading_arguments``, for every tool that also writes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="entries that may be missing, or be left out where there is no place for them, e.g. 'dino_head.*'; repeatable",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def writing_options(args: argparse.Namespace) -> dict[str, Any]:
    """``allow`` and ``overwrite``."""
    return {"allow": args.allow, "overwrite": args.overwrite}


def layout_table() -> str:
    """Every layout in a line, for the end of a --help."""
    return "layouts:\n" + "\n".join(f"  {name:<13} {layout.description}" for name, layout in LAYOUTS.items())


def add_img_size(parser: argparse.ArgumentParser, meaning: str) -> None:
    """``--img-size H [W]`` as ``(H, W)``, None if it is not given."""
    parser.add_argument("--img-size", type=int, nargs="+", action=_Size, metavar=("H", "W"), help=meaning)


class _Size(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if len(values) > 2:
            parser.error(f"--img-size takes one or two numbers; got {len(values)}")
        setattr(namespace, self.dest, (values[0], values[-1]))
