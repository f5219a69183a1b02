"""Which records share a table, and what is said of the others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dinoengine.evaluation.comparison import group_comparable, read_record, render
from tests.tools.tools import load_tool

compare_results = load_tool("compare_results")


def _record(iteration: int | None = 0, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "dataset": "digits",
        "num_images": 360,
        "protocol": {"knn": {"k": [10]}},
        "preprocessing": {"crop_size_px": [16]},
        "weights": {"sha256": "0123456789ab", "file": "" if iteration is not None else "w.pth", "iteration": iteration},
        "results": {"knn": {"top1_k10": 50.0}},
    }
    return copy.deepcopy({**record, **changes})


def test_records_group_by_what_makes_them_comparable() -> None:
    records = {
        "a": _record(),
        "b": _record(num_images=10),
        "c": _record(7, results={"knn": {"top1_k10": 60.0}, "label_free": {"rankme": 3.0}}),
        "d": _record(num_images=10, iteration=3),
    }
    assert [list(group) for group in group_comparable(records)] == [["a", "c"], ["b", "d"]]


def test_a_table_per_group_and_between_groups_the_reason() -> None:
    lines = render(
        {
            "run/eval/w.json": _record(None, results={"knn": {"top1_k10": 97.25}}),
            "run/eval/b.json": _record(399, results={"knn": {"top1_k10": 60.0}, "label_free": {"rankme": 3.5}}),
            "run/eval/a.json": _record(199),
            "other/eval/c.json": _record(9, protocol={"knn": {"k": [10, 20]}}, num_images=11),
        }
    ).splitlines()
    assert lines[0] == "Group 1 of 2: digits, 360 images"
    assert [line.split() for line in (lines[1], *lines[3:6])] == [
        ["run", "weights", "sha256", "knn/top1_k10", "label_free/rankme"],
        ["run", "iteration", "199", "01234567", "50", "-"],
        ["run", "iteration", "399", "01234567", "60", "3.5"],
        ["run", "w.pth", "01234567", "97.25", "-"],
    ]
    assert lines[7:11] == [
        "Group 2 of 2: digits, 11 images",
        "Not comparable with group 1:",
        "  num_images: 360 and 11",
        "  protocol.knn.k: [10] and [10, 20]",
    ]


def test_an_evaluator_that_one_record_lacks_is_one_line() -> None:
    knn, dense = {"knn": {"k": [10], "temperature": 0.07}}, {"dense_knn": {"k": 30}, "linear": {"lrs": [1], "seed": 0}}
    text = render(
        {
            "a/eval/a.json": _record(protocol={**knn, "linear": dense["linear"]}),
            "b/eval/b.json": _record(protocol=dense),
        }
    )
    reasons = text.split("Not comparable with group 1:\n")[1].splitlines()[:3]
    assert reasons[:2] == ["  knn: only in group 1", "  dense_knn: only in group 2"]
    assert not reasons[2].startswith("  ")


def test_weights_that_came_from_no_file_are_untrained() -> None:
    record = _record(None)
    record["weights"]["file"] = ""
    assert "untrained (no file)" in render({"a/eval/a.json": record})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is no JSON file"),
        ("[1, 2]", "lacks dataset, num_images, protocol, preprocessing, weights, results"),
        ('{"dataset": 1, "num_images": 1, "protocol": {}, "preprocessing": {}, "results": {}}', "it lacks weights"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"x.json .*{message}"):
        read_record(str(path))


def test_the_command_shows_what_it_can_and_names_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(_record()))
    bad.write_bytes(b"\xff\xfe")
    assert compare_results.main([str(good)]) == 0
    (tmp_path / "linear_heads-1-x.json").write_text("{}")  # lies beside the records, as eval/*.json finds it
    assert compare_results.main([str(good), str(tmp_path / "linear_heads-1-x.json")]) == 0
    assert "Group 1 of 1" in capsys.readouterr().out
    assert compare_results.main([str(bad), str(good), str(tmp_path / "gone.json")]) == 2
    shown = capsys.readouterr()
    assert "Group 1 of 1" in shown.out
    assert [name in shown.err for name in ("bad.json is no JSON", "gone.json", "good.json")] == [True, True, False]
    assert compare_results.main([str(tmp_path / "a\x1b[2J.json")]) == 2
    assert "\x1b" not in capsys.readouterr().err
