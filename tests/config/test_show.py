from __future__ import annotations

from pathlib import Path

import pytest

from dinoengine.config import CfgNode, get_cfg, key_origins
from dinoengine.config.show import annotated_yaml

AWKWARD = [
    ("OUTPUT_DIR", "a: b # c, [d]"),
    ("TEST.EXPECTED_RESULTS", (("knn", "top1_k20", 90.0, 2.0), ("knn", "top5_k20", 99.0, 1.0))),
    ("DATASETS.TRAIN", ("folder:/x y/é", "12")),
    ("SOLVER.EPS", 1e-12),
    ("TEST.BEST_METRIC", "x" * 200),
]


def _read_back(text: str, tmp_path: Path) -> CfgNode:
    (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "shown.yaml"))
    return cfg


@pytest.mark.parametrize("key, value", AWKWARD)
def test_what_is_shown_loads_back_to_the_same_config(tmp_path: Path, key: str, value: object) -> None:
    cfg = get_cfg()
    cfg.merge_from_list([key, value])
    assert _read_back(annotated_yaml(cfg, key_origins(cfg)), tmp_path) == cfg


def test_a_line_names_key_value_and_origin() -> None:
    cfg = get_cfg()
    origins = {"SEED": "default", "SOLVER.AMP.ENABLED": "command line"}
    text = annotated_yaml(cfg, origins)
    assert text.splitlines() == [
        "SEED: 0             # default",
        "SOLVER:",
        "  AMP:",
        "    ENABLED: false  # command line",
    ]


def test_no_origin_shows_nothing() -> None:
    assert annotated_yaml(get_cfg(), {}) == ""


def test_files_are_named_relative_to_the_current_folder_where_they_lie_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    below, elsewhere = str(tmp_path / "sub" / "a.yaml"), "/elsewhere/b.yaml"
    text = annotated_yaml(get_cfg(), {"SEED": below, "DETERMINISTIC": elsewhere})
    assert "# sub/a.yaml\n" in text
    assert "# /elsewhere/b.yaml\n" in text
