"""The config reference as a command, and what its rows say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dinoengine.config import CfgNode, get_cfg
from tests.tools.test_generate_config_docs import docs


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command writes here instead of docs/config.md."""
    path = tmp_path / "config.md"
    monkeypatch.setattr(docs, "TARGET", path)
    monkeypatch.setattr(sys, "argv", ["generate_config_docs.py"])
    return path


def _check(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["generate_config_docs.py", "--check"])
    code: int = docs.main()
    return code


def test_check_fails_without_writing_when_the_reference_is_missing_or_stale(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _check(monkeypatch) == 1
    assert not target.exists()
    target.write_text("# Config reference, of last year\n")
    assert _check(monkeypatch) == 1
    assert target.read_text() == "# Config reference, of last year\n"
    assert capsys.readouterr().err.count("run `make docs`") == 2


def test_what_the_command_writes_passes_the_check(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert docs.main() == 0
    written = target.read_text(encoding="utf-8")
    assert _check(monkeypatch) == 0
    assert target.read_text(encoding="utf-8") == written
    target.write_text(written + "\n")
    assert _check(monkeypatch) == 1


def _rows() -> list[tuple[str, list[str], list[str], str]]:
    """(section, keys, defaults, meaning) of every row of docs/config.md, as a reader of the table sees it."""
    text = (docs.ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    section, rows = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 3, f"a cell breaks the table: {line}"
            keys, defaults = (re.findall(r"`([^`]*)`", cell) for cell in cells[:2])
            rows.append((section, keys, defaults, cells[2]))
    return rows


def test_documented_defaults_are_the_real_ones() -> None:
    found = {key: value for _, keys, defaults, _ in _rows() for key, value in zip(keys, defaults, strict=True)}
    for key, shown in found.items():
        node: CfgNode = get_cfg()
        *groups, leaf = key.split(".")
        for group in groups:
            node = node[group]
        assert eval(shown, {"__builtins__": {}}) == node[leaf], key
    assert len(found) > 100


def test_each_section_stands_once_and_holds_its_own_keys() -> None:
    text = (docs.ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    for section, keys, _, _ in _rows():
        assert {key.split(".")[0] if "." in key else "Run" for key in keys} == {section}


def test_a_blank_line_ends_the_reach_of_a_comment() -> None:
    """Two keys, a blank line between them: the second is not what the first one's comment is about."""
    source = "# Meaning of the first.\n_C.A = 1\n\n# Meaning of the second.\n_C.B = 2\n"
    assert [entry.comment for entry in docs.parse_defaults(source)] == [
        "Meaning of the first.",
        "Meaning of the second.",
    ]


def test_headings_between_rules_are_no_comments() -> None:
    source = "# -----\n# Solver\n# -----\n_C.S = CN()\n# Steps.\n_C.S.N = 1\n"
    assert docs.parse_defaults(source) == [docs.Entry([("S.N", "1")], "Steps.")]


def test_every_comment_of_the_defaults_reaches_the_reader() -> None:
    lines = [line for source in docs.SOURCES for line in source.read_text(encoding="utf-8").splitlines()]
    inside_rules = {i for i, line in enumerate(lines) if i and lines[i - 1].startswith("# ---")}
    comments = [
        line.removeprefix("# ").replace("|", "&#124;")
        for i, line in enumerate(lines)
        if line.startswith("# ") and not line.startswith("# ---") and i not in inside_rules
    ]
    reference = " ".join((docs.ROOT / "docs" / "config.md").read_text(encoding="utf-8").split())
    assert [comment for comment in comments if comment not in reference] == []
