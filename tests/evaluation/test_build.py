from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    EVALUATOR_REGISTRY,
    DatasetEvaluator,
    DatasetEvaluators,
    DenseKNNEvaluator,
    KNNEvaluator,
    KNNSettings,
    UnsuitableTestSetError,
    build_evaluator,
    check_evaluator_names,
    inference_on_dataset,
)
from tests.evaluation.fakes import identity_features
from tests.masks import write_mask_folder

TEST = "synthetic:num_images=6:num_classes=3:size=8:seed=1"


def _cfg(*overrides: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS=0", "INPUT.TEST.RESIZE_PX=0", "INPUT.TEST.CROP_SIZE_PX=8"])
    cfg.merge_from_list(["DATASETS.TRAIN=synthetic:num_images=9:num_classes=3:size=8", *overrides])
    return cfg


def _knn(evaluators: DatasetEvaluators) -> KNNEvaluator:
    (evaluator,) = evaluators.evaluators
    assert isinstance(evaluator, KNNEvaluator)
    return evaluator


def test_knn_takes_its_settings_from_the_config() -> None:
    cfg = _cfg("TEST.KNN.K=(3, 5)", "TEST.KNN.TEMPERATURE=0.5", "TEST.KNN.MEMORY_MIB=77")
    cfg.merge_from_list(["TEST.KNN.NUM_PER_CLASS=(2,)", "TEST.KNN.NUM_TRIES=3", "TEST.KNN.SIMILARITY_DTYPE=float16"])
    cfg.merge_from_list(["TEST.KNN.FEATURE=patch"])
    assert _knn(build_evaluator(cfg, TEST)).settings == KNNSettings((3, 5), 0.5, (2,), 3, 77, "float16", "patch")


def test_the_defaults_are_the_published_protocol() -> None:
    """Also without a config."""
    settings = _knn(build_evaluator(_cfg(), TEST)).settings
    assert (settings.ks, settings.temperature) == ((10, 20, 100, 200), 0.07)
    assert settings == KNNSettings()


def test_neighbours_come_from_knn_train_or_else_from_the_training_set() -> None:
    assert len(_knn(build_evaluator(_cfg(), TEST)).bank_loader.dataset) == 9
    cfg = _cfg(
        "TEST.KNN.TRAIN=('synthetic:num_images=4:num_classes=3:size=8', 'synthetic:num_images=3:num_classes=3:size=8')"
    )
    assert len(_knn(build_evaluator(cfg, TEST)).bank_loader.dataset) == 7


def test_a_whole_evaluation_from_config_strings() -> None:
    cfg = _cfg("TEST.KNN.K=(1,)", "TEST.IMS_PER_BATCH=4")
    train = cfg.DATASETS.TRAIN[0]
    evaluator = build_evaluator(cfg, train)
    results = inference_on_dataset(identity_features(3 * 8 * 8), build_test_loader(cfg, train), evaluator)
    assert results == {"knn": {"top1_k1": 100.0}}  # every image is its own nearest neighbour


def test_an_evaluator_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Mine(DatasetEvaluator):
        def evaluate(self) -> dict[str, Any]:
            return {"mine": {"answer": 42.0}}

    def build_mine(cfg: CfgNode, dataset: str, make_loader: Any) -> DatasetEvaluator:
        asked.append((cfg.TEST.EVALUATORS, dataset, len(make_loader(cfg, "synthetic:num_images=5:size=8").dataset)))
        return Mine()

    monkeypatch.setattr(EVALUATOR_REGISTRY, "_obj_map", dict(EVALUATOR_REGISTRY._obj_map))
    EVALUATOR_REGISTRY.register("mine", build_mine)
    cfg = _cfg("TEST.EVALUATORS=('mine', 'knn')")
    built = build_evaluator(cfg, TEST)
    assert [type(e).__name__ for e in built.evaluators] == ["Mine", "KNNEvaluator"]
    assert asked == [(("mine", "knn"), TEST, 5)]
    assert built.evaluators[0].evaluate() == {"mine": {"answer": 42.0}}


def test_no_evaluators_give_no_results() -> None:
    assert build_evaluator(_cfg("TEST.EVALUATORS=()"), TEST).evaluate() == {}


def test_unknown_evaluators_list_the_known() -> None:
    with pytest.raises(
        KeyError, match=r"No 'kn' in the EVALUATOR registry \(did you mean 'knn'\?\).*Registered: .*knn"
    ):
        build_evaluator(_cfg("TEST.EVALUATORS=kn"), TEST)


def test_a_name_can_be_taken_once() -> None:
    with pytest.raises(ValueError, match="'knn' is already registered in the EVALUATOR registry"):
        EVALUATOR_REGISTRY.register("knn", DatasetEvaluator)


def test_every_unknown_name_is_found_before_anything_is_built() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)1\. No 'kn' .*did you mean 'knn'.*2\. No 'liner' .*did you mean 'linear'"
    ):
        check_evaluator_names(_cfg("TEST.EVALUATORS=('kn', 'label_free', 'liner')"))
    check_evaluator_names(_cfg("TEST.EVALUATORS=('knn', 'label_free')"))


def _with_masks(folder: Path, evaluators: str) -> tuple[CfgNode, str]:
    """Both kinds of test set; the mask evaluators have a training set of their own."""
    masks = write_mask_folder(folder, 2)
    cfg = _cfg(f"TEST.EVALUATORS={evaluators}", f"TEST.DENSE_KNN.TRAIN={masks}", f"TEST.SEGMENTATION.TRAIN={masks}")
    cfg.DATASETS.TEST = (TEST, masks)
    return cfg, masks


def test_labels_and_masks_may_be_evaluated_in_one_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg, masks = _with_masks(tmp_path, "('knn', 'dense_knn')")
    with caplog.at_level(logging.INFO):
        _knn(build_evaluator(cfg, TEST))
        (dense,) = build_evaluator(cfg, masks).evaluators
    assert isinstance(dense, DenseKNNEvaluator)
    left_out = [message for message in caplog.messages if "leaves out" in message]
    assert [message.split(":")[0] for message in left_out] == [
        "The evaluator 'dense_knn' leaves out 'synthetic",
        "The evaluator 'knn' leaves out 'masks",
    ]


def test_an_evaluator_that_suits_no_test_set_is_an_error(tmp_path: Path) -> None:
    cfg, masks = _with_masks(tmp_path, "('knn', 'dense_knn')")
    cfg.DATASETS.TEST = (masks,)
    with pytest.raises(UnsuitableTestSetError, match=r"'knn' needs labels.*It has masks, which 'dense_knn' and"):
        build_evaluator(cfg, masks)
    cfg.DATASETS.TEST = (TEST,)
    with pytest.raises(UnsuitableTestSetError, match=r"'dense_knn' needs masks.*labels of whole images.*'knn'"):
        build_evaluator(cfg, TEST)


def test_a_test_set_that_suits_no_evaluator_is_an_error(tmp_path: Path) -> None:
    cfg, masks = _with_masks(tmp_path, "('knn', 'logreg')")
    with pytest.raises(UnsuitableTestSetError, match="'knn' needs labels"):
        build_evaluator(cfg, masks)


def test_a_training_set_that_does_not_suit_is_always_an_error(tmp_path: Path) -> None:
    """Only what is tested decides what is left out; a wrong training set is a mistake."""
    cfg, masks = _with_masks(tmp_path, "('knn', 'dense_knn')")
    cfg.TEST.KNN.TRAIN = (masks,)
    with pytest.raises(ValueError, match="'knn' needs labels, and its training set"):
        build_evaluator(cfg, TEST)
