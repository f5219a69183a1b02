#!/usr/bin/env python
"""Write docs/config.md from the defaults in dinoengine/config/; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import NamedTuple

from dinoengine.utils.console import run_tool

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "dinoengine" / "config" / name for name in ("defaults.py", "solver_defaults.py", "evaluation_defaults.py")
]
TARGET = ROOT / "docs" / "config.md"


class Entry(NamedTuple):
    """Keys that share one comment: names, defaults as written, meaning."""

    keys: list[tuple[str, str]]
    comment: str


def parse_defaults(source: str) -> list[Entry]:
    """Entries in file order. A comment belongs to the assignments below it up to the next comment or blank line."""
    lines = source.splitlines()
    entries: list[Entry] = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not ast.unparse(node.targets[0]).startswith("_C."):
            continue
        value = ast.unparse(node.value)
        if value == "CN()":
            continue
        key = (ast.unparse(node.targets[0]).removeprefix("_C."), value)
        comment = _comment_above(lines, node.lineno - 1)
        if comment:
            entries.append(Entry([key], comment))
        else:
            assert entries, f"{key[0]} has no comment"
            entries[-1].keys.append(key)
    return entries


def read_entries() -> list[Entry]:
    """The entries of all sources, in the order of the sources."""
    return [entry for source in SOURCES for entry in parse_defaults(source.read_text(encoding="utf-8"))]


def _comment_above(lines: list[str], index: int) -> str:
    """The comment that ends above line ``index``, with that of its group (``_C.X = CN()``) in front for a first key."""
    block: list[str] = []
    index -= 1
    while index >= 0 and (lines[index].startswith("#") or lines[index].endswith("= CN()")):
        if lines[index].startswith("# ---"):
            break
        if lines[index].startswith("#"):
            block.insert(0, lines[index].lstrip("# "))
        index -= 1
    return " ".join(block)


def render(entries: list[Entry]) -> str:
    """Markdown: a section per top-level group, a row per entry."""
    parts = [
        "# Config reference",
        "",
        "Generated from the defaults in `dinoengine/config/` by `make docs`; do not edit. The defaults are the published",
        "DINOv2 short recipe. Iterations are optimizer steps; batch sizes are global.",
    ]
    section = None
    for entry in entries:
        first = entry.keys[0][0]
        name = first.split(".")[0] if "." in first else "Run"
        if name != section:
            parts += ["", f"## {name}", "", "| key | default | meaning |", "| --- | --- | --- |"]
            section = name
        keys = "<br>".join(f"`{key}`" for key, _ in entry.keys)
        values = "<br>".join(f"`{value}`" for _, value in entry.keys)
        parts.append(f"| {keys} | {values} | {entry.comment.replace('|', '&#124;')} |")
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if docs/config.md is out of date")
    args = parser.parse_args()
    text = render(read_entries())
    if args.check:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/config.md is out of date; run `make docs`.", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    print(f"Wrote {TARGET}")
    return 0


if __name__ == "__main__":
    run_tool(main)
