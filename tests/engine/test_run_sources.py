from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.config import CfgNode
from dinoengine.data import build_dataset
from dinoengine.data.quarantine import without_quarantined
from dinoengine.engine.run_sources import RunSources


@pytest.fixture
def cfg(tiny_cfg: CfgNode, tmp_path: Path) -> CfgNode:
    for name in "abc":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "l.txt").write_text("a.png\nb.png\nc.png\n")
    (tmp_path / "q.txt").write_text(f"{tmp_path}/a.png\n")
    (tmp_path / "w.pth").write_bytes(b"weights")
    np.save(tmp_path / "s.npy", np.ones(2))
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.QUARANTINE = (f"list:{tmp_path}/l.txt",), (f"{tmp_path}/q.txt",)
    tiny_cfg.MODEL.WEIGHTS, tiny_cfg.DATALOADER.SAMPLE_WEIGHTS = f"{tmp_path}/w.pth", f"{tmp_path}/s.npy"
    return tiny_cfg


def _sources(cfg: CfgNode) -> RunSources:
    return RunSources(cfg, without_quarantined(build_dataset(cfg.DATASETS.TRAIN[0]), cfg.DATASETS.QUARANTINE))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("l.txt", "a.png\nc.png\nb.png\n", "has 2 images as when .* other names, another order or other labels"),
        ("l.txt", "a.png\nb.png\nc.png\nc.png\n", "had 2 images when this checkpoint was written and has 3 now"),
        ("q.txt", "{}/b.png\n", "other names.* file of DATASETS.QUARANTINE was changed"),
        ("s.npy", "other", "SAMPLE_WEIGHTS has another content"),
        ("w.pth", "weightz", r"MODEL\.WEIGHTS .*w\.pth has another content than when this run started"),
        ("l.txt", "a.png\nb.png\r\nc.png", ""),
        ("q.txt", "# again\n{}/a.png\n", ""),
    ],
)
def test_what_changed_under_its_name_is_said_once(
    cfg: CfgNode, tmp_path: Path, file: str, content: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = _sources(cfg).state_dict()
    (tmp_path / file).write_text(content.replace("{}", str(tmp_path)))
    now = _sources(cfg)
    with caplog.at_level(logging.WARNING, logger="dinoengine"):
        caplog.clear()
        now.load_state_dict(state)
        assert len(caplog.records) == bool(message)
        if message:
            assert re.search(message, caplog.text)
    assert now.state_dict()["start_weights"] == state["start_weights"], "a run has started from one file only"


def test_weights_that_are_gone_or_others_by_name_are_no_change_of_content(
    cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = _sources(cfg).state_dict()
    old = {"num_training_images": 2}  # of a version that knew no more
    (tmp_path / "w.pth").unlink()
    gone = _sources(cfg)
    cfg.MODEL.WEIGHTS = f"{tmp_path}/q.txt"  # the table of changed keys shows it
    with caplog.at_level(logging.WARNING, logger="dinoengine"):
        caplog.clear()
        gone.load_state_dict(state)
        _sources(cfg).load_state_dict(state)
        _sources(cfg).load_state_dict(old)
    assert caplog.records == []
