from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.engine import DefaultTrainer
from dinoengine.evaluation import (
    HeadGrid,
    LinearHeads,
    LinearSettings,
    ProbeSets,
    inference_on_dataset,
    verify_results,
)
from dinoengine.evaluation.linear import LinearEvaluator, build_linear_evaluator
from dinoengine.modeling import FeatureModel, build_model
from dinoengine.structures import BackboneOutput
from dinoengine.utils import comm
from tests.evaluation.fakes import identity_features

TRAIN = "synthetic:num_images=20:num_classes=6:size=8"
VAL = "synthetic:num_images=12:num_classes=6:size=8:seed=1"
TEST = "synthetic:num_images=14:num_classes=6:size=8:seed=2"


@pytest.fixture
def cfg(tiny_cfg: CfgNode) -> CfgNode:
    """Eight heads, eight steps on ten images each."""
    tiny_cfg.merge_from_list(["MODEL.VIT.DEPTH", 4, "TEST.EVALUATORS", ("linear",), "DATASETS.TEST", (TEST,)])
    tiny_cfg.merge_from_list(["TEST.LINEAR.TRAIN", (TRAIN,), "TEST.LINEAR.BASE_LRS", (1e-5, 2.0)])
    tiny_cfg.merge_from_list(["TEST.LINEAR.IMS_PER_BATCH", 10, "TEST.LINEAR.EPOCHS", 4])
    return tiny_cfg


def _model(cfg: CfgNode) -> FeatureModel:
    torch.manual_seed(0)
    model = build_model(cfg).feature_model()
    assert isinstance(model, FeatureModel)
    return model


def _evaluator(cfg: CfgNode, dataset: str = TEST) -> LinearEvaluator:
    evaluator = build_linear_evaluator(cfg, dataset, build_test_loader)
    assert isinstance(evaluator, LinearEvaluator)
    return evaluator


def _run(
    cfg: CfgNode, model: Any = None, dataset: str = TEST
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Results, protocol, and the file of all heads."""
    evaluator = _evaluator(cfg, dataset)
    for old in Path(cfg.OUTPUT_DIR, "eval").glob("*.json"):
        old.unlink()
    results = inference_on_dataset(model or _model(cfg), build_test_loader(cfg, dataset), evaluator)
    (table,) = Path(cfg.OUTPUT_DIR, "eval").glob("linear_heads-*.json")
    return results["linear"], evaluator.protocol()["linear"], json.loads(table.read_text())


def test_without_validation_set_the_best_head_on_the_test_set_counts_and_that_is_said(cfg: CfgNode) -> None:
    results, protocol, table = _run(cfg)
    heads = table["heads"]
    assert results.keys() == {"top1", "top5"}
    assert results["top1"] == max(head["top1"] for head in heads) > min(head["top1"] for head in heads)
    best = next(head for head in heads if head["head"] == table["best"])
    assert (results["top1"], results["top5"]) == (best["top1"], best["top5"])
    assert (protocol["selected_on"], protocol["num_val_images"]) == ("test set", 0)
    assert (protocol["iterations"], protocol["num_train_images"]) == (8, 20)
    assert [head["lr"] for head in heads[:2]] == pytest.approx([1e-5 * 10 / 256, 2.0 * 10 / 256])
    assert {(head["num_last_blocks"], head["mean_patch"]) for head in heads} == {
        (1, False),
        (1, True),
        (4, False),
        (4, True),
    }


def test_a_validation_set_chooses_and_the_test_set_is_only_reported(cfg: CfgNode) -> None:
    cfg.TEST.LINEAR.VAL = (VAL,)
    results, protocol, table = _run(cfg)
    heads = table["heads"]
    chosen = max(heads, key=lambda head: head["val_top1"])
    assert table["best"] == chosen["head"]
    assert results == {name: chosen[name] for name in ("top1", "top5", "val_top1")}
    assert (protocol["selected_on"], protocol["num_val_images"]) == ("validation set", 12)
    # The same heads, judged on the validation set as a test set.
    cfg.TEST.LINEAR.VAL = ()
    as_test = _run(cfg, dataset=VAL)[2]["heads"]
    assert [head["top1"] for head in as_test] == [head["val_top1"] for head in heads]


def test_a_trained_head_beats_chance_and_a_head_that_diverges_does_no_harm(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.merge_from_list(["TEST.LINEAR.BASE_LRS", (20.0, 1e38), "TEST.LINEAR.CACHED", True, "TEST.LINEAR.EPOCHS", 80])
    results, _, table = _run(cfg, dataset=TRAIN)
    diverged = {head["head"]: head["diverged"] for head in table["heads"]}
    assert set(diverged.values()) == {False, True}
    assert any("LR 20 is at an end of TEST.LINEAR.BASE_LRS" in message for message in caplog.messages)
    assert not diverged[table["best"]]
    assert results["top1"] > 2 * 100 / 6
    assert all(head["top1"] == 0.0 for head in table["heads"] if head["diverged"])


def test_cached_features_give_what_images_without_augmentation_give(cfg: CfgNode) -> None:
    cfg.merge_from_list(["INPUT.CROP_RATIO", (1, 1), "TEST.LINEAR.CROP_SCALE", (1, 1), "TEST.LINEAR.HFLIP_PROB", 0])
    _, live_protocol, live = _run(cfg)
    cfg.TEST.LINEAR.CACHED = True
    cfg.TEST.LINEAR.VAL_PERIOD = 5
    _, protocol, cached = _run(cfg)
    assert [head["top1"] for head in cached["heads"]] == [head["top1"] for head in live["heads"]]
    assert protocol["augmentation"] == "none: cached features of evaluation crops"
    assert live_protocol["augmentation"]["crop_scale"] == [1.0, 1.0]
    cfg.merge_from_list(["TEST.LINEAR.CACHED", False, "TEST.LINEAR.CROP_SCALE", (0.2, 0.5)])
    assert [head["top1"] for head in _run(cfg)[2]["heads"]] != [head["top1"] for head in live["heads"]]


def test_looks_at_the_validation_set_change_nothing(cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    usual = _run(cfg)
    cfg.TEST.LINEAR.VAL_PERIOD = 3
    with caplog.at_level(logging.INFO):
        assert _run(cfg) == usual
    looks = [m for m in caplog.messages if "iterations the best head has" in m]
    assert [m.split()[3] for m in looks] == ["3", "6"]


def test_a_killed_probe_goes_on_when_the_command_is_given_again(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = _run(cfg)
    cfg.TEST.LINEAR.CHECKPOINT_PERIOD = 3
    step, steps = LinearHeads.step, []

    def counted(self: LinearHeads, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(kwargs["lr_factor"])
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LinearHeads, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        _run(cfg)
    with caplog.at_level(logging.INFO):
        assert _run(cfg) == usual
    assert len(steps) == 5 + 8 - 3
    assert any("going on at iteration 3 of 8" in message for message in caplog.messages)
    assert not list(Path(cfg.OUTPUT_DIR, "eval").glob("*.pth"))


@pytest.mark.parametrize("period", [0, 3])
def test_test_sets_share_the_heads_of_one_training(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    cfg.TEST.LINEAR.CHECKPOINT_PERIOD = period
    alone = {dataset: _run(cfg, dataset=dataset)[0] for dataset in (TEST, VAL)}
    step, steps = LinearHeads.step, []

    def counted(self: LinearHeads, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LinearHeads, "step", counted)
    cfg.DATASETS.TEST = (TEST, VAL)
    results = DefaultTrainer.test(cfg, _model(cfg))
    assert results == {dataset: {"linear": result} for dataset, result in alone.items()}
    assert len(steps) == 8
    assert not list(Path(cfg.OUTPUT_DIR, "eval").glob("*.pth"))
    assert verify_results([(TEST, "linear", "top1", alone[TEST]["top1"], 0.0)], results)


def test_blocks_that_are_not_there_are_left_out_and_that_is_said(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    cfg.MODEL.VIT.DEPTH = 2
    _, protocol, table = _run(cfg)
    assert protocol["num_last_blocks"] == [1]
    assert len(table["heads"]) == 4
    assert any("gives the tokens of its last 2 block(s), so of" in message for message in caplog.messages)
    cfg.TEST.LINEAR.NUM_LAST_BLOCKS = (4,)
    with pytest.raises(
        ValueError, match=r"NUM_LAST_BLOCKS is \(4,\), and VisionTransformer gives .* last 2 block\(s\) only"
    ):
        _run(cfg)


class FlatPixels(torch.nn.Module):
    """Images in, pixels out: a model of a user's own, without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.features = identity_features(192)

    def forward(self, images: Tensor) -> BackboneOutput:
        return self.features(images / 255.0)


def test_any_model_that_gives_a_cls_token_can_be_probed(cfg: CfgNode) -> None:
    cfg.TEST.LINEAR.MEAN_PATCH = (False,)
    _, protocol, table = _run(cfg, FlatPixels())
    assert protocol["num_last_blocks"] == [1]
    assert [head["head"] for head in table["heads"]] == ["blocks1-cls-lr1e-05", "blocks1-cls-lr2.0"]


def test_classes_meet_by_name(cfg: CfgNode) -> None:
    """A test set with three of the classes: its labels count otherwise than those of the heads."""
    from dinoengine.data import DatasetCatalog
    from dinoengine.data.datasets.synthetic import Synthetic

    class Reversed(Synthetic):
        def __init__(self) -> None:
            super().__init__(num_images=14, num_classes=6, size=8, seed=2)
            self.class_names = self.class_names[::-1]

        def label(self, index: int) -> int:
            return 5 - index % 6

    DatasetCatalog.register("reversed", Reversed)
    try:
        renamed = _run(cfg, dataset="reversed")[2]["heads"]
    finally:
        DatasetCatalog.remove("reversed")
    assert renamed == _run(cfg)[2]["heads"]


def test_features_that_are_not_finite_are_an_error_not_a_result(cfg: CfgNode) -> None:
    model = _model(cfg)
    with torch.no_grad():
        model.backbone.norm.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"training features of 10 of 10 images are not finite, e\.g\. synthetic:seed=0\["
    ):
        _run(cfg, model)


def test_a_batch_that_cannot_be_divided_is_refused(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="IMS_PER_BATCH 10 is global and must be divisible by the 3 processes"):
        _evaluator(cfg)


def test_length_is_passes_or_iterations(cfg: CfgNode) -> None:
    assert _evaluator(cfg).settings.num_iters == 8
    cfg.TEST.LINEAR.EPOCHS = 0.25  # of a batch the half, and a step is a whole one
    assert _evaluator(cfg).settings.num_iters == 1
    cfg.TEST.LINEAR.EPOCHS, cfg.TEST.LINEAR.ITERS = 0.0, 7
    assert _evaluator(cfg).settings.num_iters == 7


def test_the_probe_needs_no_config(cfg: CfgNode, tmp_path: Path) -> None:
    """Made from Python it gives the numbers of the config's."""
    model = _model(cfg)
    expected, protocol, _ = _run(cfg, model)
    built = _evaluator(cfg)
    sets = ProbeSets(
        train_batches=built.sets.train_batches,
        train_crops=build_test_loader(cfg, TRAIN),
        test_crops=build_test_loader(cfg, TEST),
        test_classes=range(6),
    )
    settings = LinearSettings(HeadGrid((1e-5, 2.0)), num_iters=8, ims_per_batch=10, crop_size_px=(8,))
    evaluator = LinearEvaluator(sets, settings, dataset=TEST, output_dir=str(tmp_path))
    assert inference_on_dataset(model, build_test_loader(cfg, TEST), evaluator) == {"linear": expected}
    assert evaluator.protocol()["linear"] == protocol
