"""The table of figures as a command."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dinoengine.config import defaults
from dinoengine.evaluation.numerics.checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "tools" / "verify_numerics.py"


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit code of the command in this process, whose package a test may have broken."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return ended.value.code


@pytest.mark.slow
def test_every_figure_of_this_installation_is_right() -> None:
    """All checks, as continuous integration runs them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(TOOL)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "  ok  " in line]
    assert len(rows) >= 90
    assert done.stdout.splitlines()[-1] == f"{len(rows)} quantities: {len(rows)} ok"
    for name in (
        "parameters, dinov2_vitg14_reg4",
        "LR, iteration 12500",
        "tokens, transformers with 0 registers,",
        "blurred",
    ):
        assert any(row.startswith(name) for row in rows), name


def test_a_broken_quantity_makes_it_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "schedules") == 0
    capsys.readouterr()
    monkeypatch.setitem(defaults._C.SOLVER, "BASE_LR", 4.01e-3)
    assert _run(monkeypatch, "schedules") == 1
    output = capsys.readouterr().out
    (row,) = [line for line in output.splitlines() if line.startswith("LR, iteration 12500, short recipe")]
    assert row.split()[5:9] == ["0.0056569", "0.005670996", "5e-08", "FAIL"]
    assert " FAIL" in output.splitlines()[-1]


def test_a_wrong_name_is_answered_with_the_right_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "schedule") == 2
    assert "There is no check schedule; there are sizes, schedules" in capsys.readouterr().err


def test_help_names_every_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in CHECKS)
    assert "examples:" in output
