"""What the tools share that read a config."""

from __future__ import annotations

import argparse

import pytest

from dinoengine.config.arguments import config_parser


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("What it does.", "one example:\n    %(prog)s KEY 1")
    parser.add_argument("--images", type=int, default=6)
    return parser


def test_flags_may_come_between_overrides() -> None:
    args = _parser().parse_args(["SEED", "3", "--images", "2", "LOG.PERIOD=5", "--config-file", "c.yaml"])
    assert (args.config_file, args.opts, args.images) == ("c.yaml", ["SEED", "3", "LOG.PERIOD=5"], 2)


def test_without_arguments_it_is_the_defaults() -> None:
    args = _parser().parse_args([])
    assert (args.config_file, args.opts) == ("", [])


def test_a_flag_cut_short_is_refused_rather_than_guessed() -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--image", "2"])


def test_examples_keep_their_lines() -> None:
    assert "one example:\n    " in _parser().format_help()
