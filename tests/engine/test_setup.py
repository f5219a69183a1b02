"""A prepared process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
import yaml

from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.setup import check_output_dir, default_setup, save_config


def _args(*words: str) -> argparse.Namespace:
    return default_argument_parser().parse_args(list(words))


def test_setup_writes_a_config_that_alone_reproduces_the_run(tiny_cfg: CfgNode) -> None:
    default_setup(tiny_cfg, _args())
    again = get_cfg()
    again.merge_from_file(os.path.join(tiny_cfg.OUTPUT_DIR, "config.yaml"))
    tiny_cfg.MODEL.DEVICE = "auto"  # which means the CPU here
    assert again == tiny_cfg
    text = Path(tiny_cfg.OUTPUT_DIR, "log.txt").read_text()
    assert "Python" in text
    assert "MAX_ITER: 10" in text


def test_a_device_that_auto_would_not_choose_is_kept(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, written in (("cpu", "cpu"), ("cuda", "auto")):
        tiny_cfg.MODEL.DEVICE = device
        os.makedirs(tiny_cfg.OUTPUT_DIR, exist_ok=True)
        save_config(tiny_cfg)
        assert yaml.safe_load(Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_text())["MODEL"]["DEVICE"] == written


def test_resuming_does_not_touch_the_config_before_the_checkpoint_fits(tiny_cfg: CfgNode) -> None:
    default_setup(tiny_cfg, _args())
    before = Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_bytes()
    tiny_cfg.MODEL.DINO_HEAD.NUM_PROTOTYPES = 99
    default_setup(tiny_cfg, _args("--resume"))
    assert Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_bytes() == before


def test_a_drawn_seed_is_kept_for_the_resumed_run(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SEED = -1
    tiny_cfg.freeze()
    first = default_setup(tiny_cfg, _args())
    assert first.SEED >= 0
    assert first.is_frozen()
    saved = yaml.safe_load(Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_text())
    assert saved["SEED"] == first.SEED
    assert default_setup(tiny_cfg, _args("--resume")).SEED == first.SEED


def test_eval_only_does_not_overwrite_the_config_of_a_run(tiny_cfg: CfgNode) -> None:
    default_setup(tiny_cfg, _args())
    tiny_cfg.SOLVER.MAX_ITER = 77
    default_setup(tiny_cfg, _args("--eval-only"))
    assert yaml.safe_load(Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == 10


@pytest.mark.parametrize("trace", ["last_checkpoint", "model_final.pth", "metrics.json"])
def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).write_text("x")
    with pytest.raises(ConfigError, match=f"already holds a run \\({trace}\\).*--resume"):
        check_output_dir(str(tmp_path), new_run=True)
    check_output_dir(str(tmp_path), new_run=False)


def test_leftovers_of_a_start_that_failed_are_no_run(tmp_path: Path) -> None:
    for name in ("log.txt", "config.yaml"):
        (tmp_path / name).write_text("x")
    (tmp_path / "metrics.json").touch()
    check_output_dir(str(tmp_path), new_run=True)


def test_an_output_dir_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); choose another"):
        check_output_dir(str(tmp_path / "file" / "run"), new_run=True)
    with pytest.raises(ConfigError, match="file is a file; name a folder"):
        check_output_dir(str(tmp_path / "file"), new_run=True)
    with pytest.raises(ConfigError, match="is empty; name a folder"):
        check_output_dir("", new_run=True)
