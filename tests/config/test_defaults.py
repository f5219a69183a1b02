from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinoengine.config import CfgNode, defaults, evaluation_defaults, get_cfg, solver_defaults, validate

SOURCE = [
    line
    for module in (defaults, solver_defaults, evaluation_defaults)
    for line in Path(module.__file__).read_text(encoding="utf-8").splitlines()
]
ASSIGNMENT = re.compile(r"^_C\.([A-Z0-9_.]+) = (.*)$")


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _assignments() -> list[tuple[int, str]]:
    """(line index, key) of every key that is no group."""
    found = [(i, ASSIGNMENT.match(line)) for i, line in enumerate(SOURCE)]
    return [(i, match[1]) for i, match in found if match and match[2] != "CN()"]


def _comment_above(index: int) -> str:
    """The comment over the unbroken run of assignments that holds the line; empty when there is none."""
    while ASSIGNMENT.match(SOURCE[index]):
        index -= 1
    end = index + 1
    while SOURCE[index].startswith("#"):
        index -= 1
    return " ".join(line.lstrip("# ") for line in SOURCE[index + 1 : end])


@pytest.mark.parametrize(("index", "key"), _assignments(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_key_has_a_comment_above_it_or_above_its_run(index: int, key: str) -> None:
    text = _comment_above(index)
    assert len(re.findall(r"[A-Za-z]{2,}", text)) >= 2, (
        f"{key} (line {index + 1} of the sources) is not explained: {text!r}"
    )


def test_every_key_is_assigned_once_and_the_source_lists_them_all() -> None:
    keys = [key for _, key in _assignments()]
    assert len(keys) == len(set(keys))
    assert sorted(keys) == sorted(key for key, _ in _leaves(get_cfg()))


def test_every_default_has_a_type_that_overrides_can_be_converted_to() -> None:
    assert {type(value) for _, value in _leaves(get_cfg())} <= {bool, int, float, str, tuple}


@pytest.mark.parametrize("world_size", [1, 8, 32])
def test_the_defaults_are_a_valid_recipe_without_warnings(world_size: int) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("folder:/images",)
    assert validate(cfg, world_size) == []
