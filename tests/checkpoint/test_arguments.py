"""What the tools that read weights have in common."""

from __future__ import annotations

import argparse

import pytest

from dinoengine.checkpoint.arguments import (
    add_img_size,
    layout_table,
    reading_arguments,
    reading_options,
    writing_arguments,
    writing_options,
)
from dinoengine.checkpoint.layouts import LAYOUTS, Hints


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(parents=[reading_arguments(), writing_arguments()])
    add_img_size(parser, "pixels")
    parser.add_argument("input")
    return parser.parse_args(words)


def test_a_pattern_does_not_swallow_the_file() -> None:
    args = _parse("--allow", "dino_head.*", "--allow", "mask_token", "in.pth")
    assert (args.input, args.allow) == ("in.pth", ["dino_head.*", "mask_token"])


def test_what_the_functions_get() -> None:
    args = _parse("in.pth", "--from", "meta", "--num-heads", "3", "--grid", "2", "5", "--overwrite")
    assert reading_options(args) == {"layout": "meta", "hints": Hints(3, (2, 5))}
    assert writing_options(args) == {"allow": [], "overwrite": True}
    assert reading_options(_parse("in.pth"))["hints"] == Hints()


@pytest.mark.parametrize(("words", "size"), [([], None), (["28"], (28, 28)), (["28", "42"], (28, 42))])
def test_one_number_is_a_square(words: list[str], size: tuple[int, int] | None) -> None:
    assert _parse("in.pth", *(["--img-size", *words] if words else [])).img_size == size


def test_three_numbers_are_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse("in.pth", "--img-size", "1", "2", "3")
    assert "--img-size takes one or two numbers; got 3" in capsys.readouterr().err


def test_every_layout_is_listed() -> None:
    assert all(f"  {name} " in layout_table() for name in LAYOUTS)
