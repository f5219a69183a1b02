"""Command-line arguments of whatever reads a config."""

from __future__ import annotations

import argparse
from typing import Any


class _IntermixedParser(argparse.ArgumentParser):
    """Takes flags anywhere among the overrides."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def config_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with ``--config-file`` and overrides (``opts``), to which a command adds its own; ``read_cfg`` takes both.

    Flags may come between overrides.
    """
    parser = _IntermixedParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config; without it the defaults")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser
