from __future__ import annotations

from typing import Any

import pytest

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    EVALUATOR_REGISTRY,
    DatasetEvaluator,
    DatasetEvaluators,
    KNNEvaluator,
    build_evaluator,
    inference_on_dataset,
)
from tests.evaluation.fakes import identity_features

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
    evaluator = _knn(build_evaluator(cfg, TEST))
    assert (evaluator.ks, evaluator.temperature, evaluator.memory_mib) == ((3, 5), 0.5, 77)
    assert (evaluator.num_per_class, evaluator.num_tries, evaluator.similarity_dtype) == ((2,), 3, "float16")


def test_the_defaults_are_the_published_protocol() -> None:
    evaluator = _knn(build_evaluator(_cfg(), TEST))
    assert (evaluator.ks, evaluator.temperature) == ((10, 20, 100, 200), 0.07)


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
