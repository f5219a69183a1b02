"""Command-line arguments of the tools that read a config and do something else with it than train."""

from __future__ import annotations

import argparse


def config_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with ``--config-file`` and overrides (``opts``), to which a tool adds its own; ``read_cfg`` takes both.

    Parse with ``parse_intermixed_args``, so that flags may come between overrides.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config; without it the defaults")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser
