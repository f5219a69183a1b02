"""tools/generate_param_schedule.py prints what the solver will do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dinoengine.config import CfgNode
from tests.tools.tools import load_tool

generate_param_schedule = load_tool("generate_param_schedule")


@pytest.fixture
def tiny_file(tiny_cfg: CfgNode, tmp_path: Path) -> str:
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 100])
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


def _run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert generate_param_schedule.main(words) == 0
    return str(capsys.readouterr().out)


def _numbers(out: str, row: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.strip().startswith(row)]
    return line.strip().removeprefix(row).split()


def test_the_default_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(["--at", "0", "1", "37500", "DATASETS.TRAIN", "synthetic"], capsys)
    assert "Batch 2048, peak LR 5.6569e-03 (SOLVER.BASE_LR 0.004, sqrt scaling)" in out
    assert _numbers(out, "tokens and positions") == ["0.07179", "1", "4.0610e-04", "203,776"]
    assert _numbers(out, "1 ") == ["4.5258e-07", "0.0000e+00", "0.040000", "0.992000", "0.040001"]
    assert _numbers(out, "37,500") == ["4.9952e-03", "4.9952e-03", "0.114199", "0.993649", "0.070000"]
    assert "WARNING" not in out


def test_blocks_whose_factors_are_equal_share_their_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-L: two rows (with and without weight decay) for 24 blocks without layer decay, else for each."""
    words = ["--at", "0", "DATASETS.TRAIN", "synthetic"]
    together = _run([*words, "SOLVER.LAYER_DECAY", "1"], capsys)
    rows = [line for line in together.splitlines() if line.startswith("block")]
    assert [row.split()[:4] for row in rows] == [["blocks", "0", "to", "23"]] * 2
    # weights and biases of 24 blocks of width 1024: 12 D^2 with decay, 15 D without (see tests/solver/test_report.py)
    assert [row.split()[-1] for row in rows] == [f"{24 * 12 * 1024**2:,}", f"{24 * 15 * 1024:,}"]
    apart = _run([*words, "SOLVER.LAYER_DECAY", "0.9"], capsys)
    assert len([line for line in apart.splitlines() if line.startswith("block")]) == 48
    total = [line for out in (together, apart) for line in out.splitlines() if line.startswith("total")]
    assert total[0].split() == total[1].split()


def test_iterations_and_overrides_may_follow_each_other(tiny_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = _run(["--config-file", tiny_file, "--at", "3", "7", "SOLVER.MAX_ITER", "50"], capsys)
    second = _run(["SOLVER.MAX_ITER=50", "--config-file", tiny_file, "--at", "3", "7"], capsys)
    assert first == second
    assert "Schedules of 50 iterations" in first
    assert [line.split()[0] for line in first.splitlines()[-2:]] == ["3", "7"]


def test_without_iterations_the_turning_points_are_printed(tiny_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(["--config-file", tiny_file], capsys)
    rows = out.split("teacher_temp\n")[1].splitlines()[1:]
    assert [int(row.split()[0]) for row in rows] == [0, 1, 2, 3, 4, 25, 50, 75, 99]


def test_a_schedule_for_a_run_ten_times_as_long_is_named(tiny_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(["--config-file", tiny_file, "SOLVER.WARMUP_ITERS", "160"], capsys)
    (warning,) = [line for line in out.splitlines() if line.startswith("WARNING")]
    assert re.search(r"never reaches its peak 0\.01: .*62\.3% of it", warning)


def test_plot_writes_a_png(tiny_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "schedules.png"
    assert f"Wrote {path}" in _run(["--config-file", tiny_file, "--plot", str(path)], capsys)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--at", "100"], "--at 100 is beyond the run, whose iterations are 0 to 99"),
        (["--plot", "missing/folder/s.png"], "make it first"),
        (["--plot", "s.pdf"], "must end in .png"),
        (["--at", "3", "x"], "x has no value"),
        (["SOLVER.LAYER_DECAY", "2"], "SOLVER.LAYER_DECAY must be"),
    ],
)
def test_mistakes_end_with_one_line(
    tiny_file: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        generate_param_schedule.main(["--config-file", tiny_file, *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
