"""Weights and the pixels of their training: other pixels are noticed wherever weights are used."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoengine.checkpoint import load_backbone
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.export import _metadata
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.pixels import pixel_changes, require_same_pixels, warn_of_other_pixels
from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.engine import DefaultPredictor, SSLTrainer, load_weights_for_evaluation
from tests.checkpoint.models import random_weights

CHANNELS = ["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (0, 4095)]
STATISTICS = ["MODEL.PIXEL_MEAN", (0.1, 0.2), "MODEL.PIXEL_STD", (0.25, 0.5)]


@pytest.fixture
def run(tiny_cfg: CfgNode, tmp_path: Path) -> tuple[CfgNode, str]:
    """Config and checkpoint of a run on 12 bit images with two channels."""
    rng = np.random.default_rng(0)
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", rng.integers(0, 4096, (12, 12, 2), dtype=np.uint16))
    tiny_cfg.merge_from_list([*CHANNELS, *STATISTICS, "DATASETS.TRAIN", f"folder:{tmp_path}:arrays=true"])
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"])
    trainer = SSLTrainer(tiny_cfg)
    trainer.train()
    return tiny_cfg, trainer.checkpointer.save("model_final")


def _evaluate(cfg: CfgNode, weights: str) -> None:
    cfg.MODEL.WEIGHTS = weights
    load_weights_for_evaluation(cfg, SSLTrainer.build_model(cfg), resume=False)


def test_an_evaluation_with_the_pixels_of_the_training(run: tuple[CfgNode, str]) -> None:
    _evaluate(*run)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["MODEL.PIXEL_MEAN", (0.1, 0.3)],
            r'PIXEL_MEAN is \(0.1, 0.3\), the weights are of \(0.1, 0.2\)[\s\S]*MODEL.PIXEL_MEAN "\(0.1, 0.2\)"',
        ),
        (["MODEL.PIXEL_STD", (0.5, 0.5)], r"PIXEL_STD is \(0.5, 0.5\), the weights are of \(0.25, 0.5\)"),
        (["INPUT.VALUE_RANGE", (0, 65535)], r"VALUE_RANGE is \(0, 65535\), the weights are of \(0, 4095\)"),
    ],
)
def test_an_evaluation_with_other_pixels_is_refused(
    overrides: list[Any], message: str, run: tuple[CfgNode, str]
) -> None:
    cfg, weights = run
    cfg.merge_from_list(overrides)
    with pytest.raises(ConfigError, match=message):
        _evaluate(cfg, weights)
    with pytest.raises(ConfigError, match="was trained with other pixels"):
        DefaultPredictor(cfg)


def test_a_training_may_change_them_and_keeps_the_new_ones(
    run: tuple[CfgNode, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, weights = run
    cfg.merge_from_list(["MODEL.WEIGHTS", weights, "MODEL.PIXEL_MEAN", (0.3, 0.2), "OUTPUT_DIR", str(tmp_path / "on")])
    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert "OTHER PIXELS than those" in caplog.text
    assert "MODEL.PIXEL_MEAN is (0.3, 0.2), the weights are of (0.1, 0.2)" in caplog.text
    path = trainer.checkpointer.save("next")
    _evaluate(cfg, path)
    cfg.MODEL.PIXEL_MEAN = (0.1, 0.2)
    with pytest.raises(ConfigError, match=r"the weights are of \(0.3, 0.2\)"):
        _evaluate(cfg, path)


def test_features_and_the_predictor_agree_on_what_a_file_holds(run: tuple[CfgNode, str], tmp_path: Path) -> None:
    """The same pixels by the config, by the checkpoint alone, and by hand."""
    cfg, weights = run
    cfg.merge_from_list(["MODEL.WEIGHTS", weights, "INPUT.TEST.RESIZE_PX", 0, "INPUT.TEST.CROP_SIZE_PX", (12,)])
    stored = np.load(tmp_path / "0.npy")
    predictor = DefaultPredictor(cfg)
    by_path, by_array = predictor(str(tmp_path / "0.npy")).cls_token, predictor(stored).cls_token
    images = torch.from_numpy((stored / 4095).astype(np.float32)).permute(2, 0, 1)[None]
    by_file = load_backbone(weights)
    assert torch.equal(by_path, by_array)
    torch.testing.assert_close(by_file(images).cls_token, by_path)
    mean, std = torch.tensor([0.1, 0.2]).view(2, 1, 1), torch.tensor([0.25, 0.5]).view(2, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(by_file.backbone((images - mean) / std).cls_token, by_path)
    with pytest.raises(ValueError, match=r"Got images of torch.int32; expected uint8 .* INPUT.VALUE_RANGE"):
        by_file((images * 4095).int())


def test_an_export_says_how_values_become_input(run: tuple[CfgNode, str]) -> None:
    facts = _metadata(read_weights(run[1]), (8, 8))
    assert {name: json.loads(facts[name]) for name in ("mean", "std", "value_range")} == {
        "mean": [0.1, 0.2],
        "std": [0.25, 0.5],
        "value_range": [0, 4095],
    }
    assert facts["format"] == "channels"
    assert "((values - 0) / (4095 - 0), cut to 0..1, - mean) / std" in facts["input"]


def test_statistics_given_by_hand_win_and_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = get_cfg()
    path = str(tmp_path / "own.pth")
    save_weights(replace(random_weights(), config=str(cfg.dump())), path, "dinoengine")
    with caplog.at_level(logging.WARNING):
        load_backbone(path, pixel_mean=cfg.MODEL.PIXEL_MEAN)
        assert "OTHER PIXELS" not in caplog.text
        model = load_backbone(path, pixel_mean=(0.5, 0.5, 0.5))
    assert (
        "own.pth was trained with MODEL.PIXEL_MEAN (0.485, 0.456, 0.406), and (0.5, 0.5, 0.5) is asked" in caplog.text
    )
    assert model.pixel_norm.pixel_mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "data",
    [
        {"state_dict": {}},
        {"config": {"hidden_size": 64}},
        {"config": "- no keys"},
        {"config": "MODEL: {PIXEL_MEAN: [9.0]}", "config_origin": "conversion"},
    ],
)
def test_of_files_that_hold_no_config_of_a_run_nothing_is_known(data: dict[str, Any]) -> None:
    assert pixel_changes(get_cfg(), data) == []


def test_keys_of_an_older_version_count_as_their_defaults() -> None:
    """INPUT.VALUE_RANGE is younger than many checkpoints; of other keys nothing is compared."""
    data = {"config": "MODEL: {PIXEL_MEAN: [0.5, 0.456, 0.406]}\nSEED: 7\nNO_SUCH_KEY: 1"}
    (change,) = pixel_changes(get_cfg(), data)
    assert change.key == "MODEL.PIXEL_MEAN"
    with pytest.raises(
        ConfigError, match=r'w.pth was trained with other pixels[\s\S]*MODEL.PIXEL_MEAN "\(0.5, 0.456, '
    ):
        require_same_pixels(get_cfg())(data, "w.pth")
    warn_of_other_pixels(get_cfg())({"config": get_cfg().dump()}, "w.pth")
