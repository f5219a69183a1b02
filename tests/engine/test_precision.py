"""SOLVER.AMP.PRECISION auto: measured once, then kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinoengine.config import CfgNode, ConfigError
from dinoengine.engine import default_argument_parser, default_setup
from dinoengine.engine import precision as precision_module
from dinoengine.engine.precision import resolve_precision, time_products


def _auto(cfg: CfgNode) -> CfgNode:
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "auto"])
    return cfg


def _never(device: str) -> dict[str, float]:
    raise AssertionError("measured again")


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16"), (2.0, "fp32")])
def test_the_faster_one_is_chosen_and_logged(
    tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture, bf16: float, chosen: str
) -> None:
    with caplog.at_level(logging.INFO, logger="dinoengine"):
        cfg = resolve_precision(_auto(tiny_cfg), list, lambda device: {"fp32": 1.0, "bf16": bf16})
    assert cfg.SOLVER.AMP.ENABLED
    assert chosen == cfg.SOLVER.AMP.PRECISION
    assert f"auto: {chosen} on cpu" in caplog.text
    assert "fp32 1000.00 ms" in caplog.text


def _saved(precision: str) -> list[dict[str, Any]]:
    return [{"SEED": 1}, {"SOLVER": {"AMP": {"ENABLED": True, "PRECISION": precision}}}]


@pytest.mark.parametrize(("saved", "device"), [("bf16", "cpu"), ("fp32", "cpu"), ("fp16", "cuda")])
def test_a_resumed_run_keeps_what_it_had(tiny_cfg: CfgNode, saved: str, device: str) -> None:
    tiny_cfg.MODEL.DEVICE = device
    assert saved == resolve_precision(_auto(tiny_cfg), lambda: _saved(saved), _never).SOLVER.AMP.PRECISION


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.DEVICE", "cpu", "SOLVER.AMP.PRECISION fp16 needs CUDA"),
        ("MODEL.PARALLEL", "fsdp", "SOLVER.AMP.PRECISION fp16 is not possible with MODEL.PARALLEL fsdp"),
    ],
)
def test_what_it_had_must_be_possible_now(tiny_cfg: CfgNode, key: str, value: str, message: str) -> None:
    """A run in fp16, resumed with auto on a CPU or in shares: the checks before saw "auto" and had nothing to say."""
    tiny_cfg.merge_from_list(["MODEL.DEVICE", "cuda", key, value])
    with pytest.raises(ConfigError, match=message):
        resolve_precision(_auto(tiny_cfg), lambda: _saved("fp16"), _never)


def test_nothing_is_measured_for_what_is_said(tiny_cfg: CfgNode) -> None:
    assert resolve_precision(tiny_cfg, list, _never) is tiny_cfg
    tiny_cfg.merge_from_list(["SOLVER.AMP.ENABLED", False, "SOLVER.AMP.PRECISION", "auto"])
    assert resolve_precision(tiny_cfg, list, _never) is tiny_cfg


def test_products_of_both_precisions_are_timed() -> None:
    seconds = time_products("cpu")
    assert seconds.keys() == {"fp32", "bf16"}
    assert all(0 < s < 60 for s in seconds.values())


def test_the_choice_is_written_and_read_back_by_a_resumed_run(
    tiny_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _auto(tiny_cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.freeze()
    monkeypatch.setattr(precision_module, "time_products", lambda device: {"fp32": 1.0, "bf16": 0.5})
    first = default_setup(cfg, default_argument_parser().parse_args([]))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["SOLVER"]["AMP"]["PRECISION"] == "bf16"
    monkeypatch.setattr(precision_module, "time_products", _never)
    again = default_setup(cfg, default_argument_parser().parse_args(["--resume"]))
    assert first.SOLVER.AMP.PRECISION == again.SOLVER.AMP.PRECISION == "bf16"
