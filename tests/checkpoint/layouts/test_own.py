"""dinoengine's own files: what their config says of the weights, and what is done without one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from dinoengine.checkpoint.classifier import convert_to_classifier
from dinoengine.checkpoint.convert import convert, save_weights
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.own import Own
from dinoengine.checkpoint.weights import Weights
from dinoengine.config import CfgNode, cfg_from_text, get_cfg
from dinoengine.modeling import build_model
from tests.checkpoint.models import SMALL, random_weights

FOUR_HEADS = replace(SMALL, num_heads=4)


def _save(path: Path, weights: Weights, **changes: object) -> str:
    """``changes`` of the file's entries; None removes one."""
    content = {**Own().write(weights)[0].data, **changes}
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return str(path)


def test_without_a_config_the_heads_must_be_told(tmp_path: Path) -> None:
    """64 channels for each is what published models have; this one may be any."""
    path = _save(tmp_path / "x.pth", random_weights(FOUR_HEADS), config=None)
    with pytest.raises(CheckpointError, match=r"x\.pth has no config.*--num-heads"):
        read_weights(path)
    assert read_weights(path, hints=Hints(num_heads=4)).spec == FOUR_HEADS


def test_a_config_of_another_version_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = read_checkpoint(_save(tmp_path / "x.pth", random_weights(FOUR_HEADS)))["config"]
    old = (f"{text}\nOLD_KEY: 3\n", "MODEL: [", "a line", "MODEL: {VIT: {DEPTH: many}}")
    wrong_values = ("MODEL: {VIT: {PATCH_SIZE_PX: 0}}", "MODEL: {VIT: {SIZE: vast}}")
    for wrong in (*old, *wrong_values):
        path = _save(tmp_path / "old.pth", random_weights(FOUR_HEADS), config=wrong, config_origin=None)
        with pytest.raises(CheckpointError, match=r"old\.pth.*--num-heads"):
            read_weights(path)
        caplog.clear()
        weights = read_weights(path, hints=Hints(num_heads=4))
        assert weights.spec == FOUR_HEADS
        assert weights.config is None
        assert f"{path}: its config cannot be read by this version" in caplog.text


def test_a_run_can_start_from_a_file_with_an_old_config(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    model = build_model(tiny_cfg)
    path = Checkpointer(model, str(tmp_path), metadata={"config": "OLD_KEY: 1"}).save("old")
    tiny_cfg.merge_from_list(["MODEL.IBOT_HEAD.SEPARATE", True])
    Checkpointer(build_model(tiny_cfg), "", strict=False).load_weights(path)
    convert(path, str(tmp_path / "meta.pth"), "meta", hints=Hints(2), allow=["*head.*", "student.*", "centers.*"])


def _config_in(path: Path) -> CfgNode:
    return cfg_from_text(read_checkpoint(str(path))["config"])


def test_the_config_of_a_converted_file_builds_its_heads(tmp_path: Path) -> None:
    weights = random_weights(heads=True)  # 12 and 13 prototypes
    save_weights(weights, str(tmp_path / "own.pth"), "dinoengine")
    cfg = _config_in(tmp_path / "own.pth")
    assert (cfg.MODEL.DINO_HEAD.NUM_PROTOTYPES, cfg.MODEL.DINO_HEAD.HIDDEN_DIM) == (12, 20)
    assert (cfg.MODEL.IBOT_HEAD.SEPARATE, cfg.MODEL.IBOT_HEAD.NUM_PROTOTYPES) == (True, 13)
    cfg.merge_from_list(["INPUT.GLOBAL_CROPS.SIZE_PX", 28, "INPUT.LOCAL_CROPS.SIZE_PX", 14])
    model = build_model(cfg)
    Checkpointer(model, "").load_weights(str(tmp_path / "own.pth"))  # strict
    head = model.get_submodule("teacher.ibot_head").state_dict()
    assert all(torch.equal(head[name], value) for name, value in weights.parts["ibot_head"].items())


def test_the_config_of_a_converted_classifier_builds_it(tmp_path: Path) -> None:
    weights = random_weights()
    weights.parts["linear_head"] = {"weight": torch.randn(5, 128), "bias": torch.randn(5)}
    save_weights(weights, str(tmp_path / "own.pth"), "dinoengine")
    cfg = _config_in(tmp_path / "own.pth")
    classifier = cfg.MODEL.CLASSIFIER
    assert cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    assert (classifier.NUM_CLASSES, classifier.NUM_LAST_BLOCKS, classifier.MEAN_PATCH) == (5, 1, True)
    Checkpointer(build_model(cfg), "").load_weights(str(tmp_path / "own.pth"))


@pytest.mark.parametrize("patch_size", [7, 10])
def test_a_config_made_by_a_conversion_is_not_taken_for_that_of_a_run(patch_size: int, tmp_path: Path) -> None:
    """What no file says (crops, pixel statistics) must not become a fact by being converted."""
    _save(tmp_path / "once.pth", random_weights(replace(SMALL, patch_size=patch_size)))
    convert(str(tmp_path / "once.pth"), str(tmp_path / "twice.pth"), "dinoengine")
    convert_to_classifier(str(tmp_path / "twice.pth"), str(tmp_path / "cls.pth"), num_classes=3)
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "cls.yaml"))
    assert (4 * patch_size, 4 * patch_size) == cfg.INPUT.GLOBAL_CROPS.SIZE_PX  # the table's, not a default


def test_the_config_of_a_run_is_kept_as_it_is(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.merge_from_list(["MODEL.PIXEL_MEAN", (0.1, 0.2, 0.3), "MODEL.VIT.LAYER_SCALE_INIT", 0.25])
    path = Checkpointer(build_model(tiny_cfg), str(tmp_path), metadata={"config": tiny_cfg.dump()}).save("run")
    convert(path, str(tmp_path / "out.pth"), "dinoengine")
    kept = read_weights(str(tmp_path / "out.pth")).config
    assert kept is not None
    cfg = cfg_from_text(kept)
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.VIT.LAYER_SCALE_INIT) == ((0.1, 0.2, 0.3), 0.25)
    assert cfg.MODEL.DINO_HEAD == tiny_cfg.MODEL.DINO_HEAD


def test_what_belongs_to_the_training_is_left_out_and_said(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tiny_cfg)
    trainer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = Checkpointer(model, str(tmp_path), metadata={"config": tiny_cfg.dump()}, trainer=trainer)  # type: ignore[arg-type]
    source = checkpointer.save("full", iteration=7)
    assert read_weights(source).left_out == ["trainer", "iteration"]
    with caplog.at_level(logging.INFO):
        convert(source, str(tmp_path / "out.pth"), "dinoengine")
    assert "Left out, as it belongs to the training: trainer, iteration." in caplog.text
    assert torch.load(tmp_path / "out.pth").keys() == {"model", "config"}
