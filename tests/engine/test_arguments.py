"""Flags and overrides."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dinoengine.engine.arguments import default_argument_parser


def _args(*words: str) -> argparse.Namespace:
    return default_argument_parser().parse_args(list(words))


@pytest.mark.parametrize(
    "words",
    [
        ["--num-gpus", "2", "--resume", "A.B", "1", "C=2"],
        ["A.B", "1", "C=2", "--num-gpus", "2", "--resume"],
        ["A.B", "1", "--num-gpus", "2", "C=2", "--resume"],
    ],
)
def test_flags_stand_before_after_or_among_overrides(words: list[str]) -> None:
    args = _args(*words)
    assert (args.num_gpus, args.resume, args.opts) == (2, True, ["A.B", "1", "C=2"])


def test_negative_values_are_values(tmp_path: Path) -> None:
    assert _args("SEED", "-1", "--resume").opts == ["SEED", "-1"]


@pytest.mark.parametrize("flag", ["--resum", "--gpus"])
def test_a_flag_that_does_not_exist_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _args(flag)
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
