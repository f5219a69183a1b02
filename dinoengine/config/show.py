"""A config as YAML with a comment behind every key that says what set it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dinoengine.config.config import CfgNode


def annotated_yaml(cfg: CfgNode, origins: Mapping[str, str]) -> str:
    """``cfg`` as YAML that loads back to it, one key a line, with the origin of each as a comment.

    Args:
        origins: key -> origin, e.g. from ``key_origins``; keys that are not in it are left out. Files below the current
            folder are named relative to it.
    """
    lines = list(_lines(cfg, origins, ""))
    # One long value shall not push every comment to the right.
    width = min(60, max((len(line) for line, origin in lines if origin), default=0))
    return "".join(f"{line:<{width}}  # {_short(origin)}\n" if origin else f"{line}\n" for line, origin in lines)


def _lines(node: CfgNode, origins: Mapping[str, str], path: str) -> Iterator[tuple[str, str]]:
    """(YAML line, origin) of each key below ``node``; the origin of a heading is empty."""
    indent = "  " * path.count(".")
    for name, value in node.items():
        if isinstance(value, CfgNode):
            below = list(_lines(value, origins, f"{path}{name}."))
            if below:
                yield f"{indent}{name}:", ""
                yield from below
        elif f"{path}{name}" in origins:
            yield f"{indent}{name}: {_inline(value)}", origins[f"{path}{name}"]


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    # A list of one in flow style, without its brackets: a bare scalar would be followed by an end-of-document mark.
    return yaml.dump([plain], Dumper=_TupleDumper, default_flow_style=True, width=float("inf"))[1:-2]


class _TupleDumper(yaml.SafeDumper):
    """Writes tuples as lists, also inside lists."""


_TupleDumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def _short(origin: str) -> str:
    relative = os.path.relpath(origin) if os.path.isabs(origin) else origin
    return origin if relative.startswith(os.pardir) else relative
