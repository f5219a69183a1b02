from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.evaluation import DenseKNNEvaluator, build_evaluator, inference_on_dataset
from dinoengine.structures import IGNORE, BackboneOutput
from tests.evaluation.dense_fakes import ColourPatches, ConstantPatches, use_masks
from tests.masks import CELL_PX


@pytest.fixture
def knn_cfg(tiny_cfg: CfgNode, tmp_path: Path) -> CfgNode:
    use_masks(tiny_cfg, tmp_path, "dense_knn")
    tiny_cfg.merge_from_list(["TEST.DENSE_KNN.K", 5])
    return tiny_cfg


def _results(cfg: CfgNode, model: nn.Module) -> Any:
    test = cfg.DATASETS.TEST[0]
    return inference_on_dataset(model, build_test_loader(cfg, test), build_evaluator(cfg, test))["dense_knn"]


@pytest.mark.parametrize("keys", [[], ["TEST.DENSE_KNN.NUM_PATCHES", 90, "TEST.DENSE_KNN.BALANCED", True]])
def test_patches_that_look_alike_have_one_class(knn_cfg: CfgNode, keys: list[Any]) -> None:
    knn_cfg.merge_from_list(keys)
    good = _results(knn_cfg, ColourPatches())
    assert good["miou"] > 85
    assert good["pixel_accuracy"] > 93
    knn_cfg.merge_from_list(["TEST.DENSE_KNN.MEMORY_MIB", 1, "TEST.IMS_PER_BATCH", 1])
    assert _results(knn_cfg, ColourPatches()) == pytest.approx(good)
    if not keys:  # else any class may be first among equals
        assert _results(knn_cfg, ConstantPatches())["miou"] < 35


def test_the_nearest_patch_by_hand(knn_cfg: CfgNode) -> None:
    """k = 1, without interpolation: each test patch answers with the class of the training patch of largest cosine."""
    knn_cfg.merge_from_list(["TEST.DENSE_KNN.K", 1])
    test = knn_cfg.DATASETS.TEST[0]

    def patches(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(build_test_loader(knn_cfg, text))
        tokens = torch.cat([ColourPatches()(batch.images).patch_tokens for batch in batches]).flatten(0, 1).detach()
        classes = torch.cat([batch.masks[:, ::CELL_PX, ::CELL_PX] for batch in batches]).flatten()  # one per cell
        return nn.functional.normalize(tokens, dim=1), classes

    bank, bank_classes = patches(knn_cfg.DATASETS.TRAIN[0])
    bank, bank_classes = bank[bank_classes != IGNORE], bank_classes[bank_classes != IGNORE]
    queries, _ = patches(test)
    expected = bank_classes[(queries @ bank.T).argmax(1)].view(6, 8, 8)

    (evaluator,) = build_evaluator(knn_cfg, test).evaluators
    assert isinstance(evaluator, DenseKNNEvaluator)
    evaluator.prepare(ColourPatches())
    scores = evaluator._scores(queries).view(6, 8, 8, 3)
    assert torch.equal(scores.argmax(3), expected.long())
    torch.testing.assert_close(scores.sum(3), torch.ones(6, 8, 8))


def test_more_neighbours_than_patches_means_all(knn_cfg: CfgNode) -> None:
    knn_cfg.merge_from_list(
        ["TEST.DENSE_KNN.K", 1000, "TEST.DENSE_KNN.NUM_PATCHES", 40, "TEST.DENSE_KNN.TEMPERATURE", 9]
    )
    all_vote = _results(knn_cfg, ColourPatches())
    assert all_vote["miou"] < 35  # the largest class wins everywhere
    knn_cfg.merge_from_list(["TEST.DENSE_KNN.K", 40])
    assert _results(knn_cfg, ColourPatches()) == all_vote


def test_every_key_arrives(knn_cfg: CfgNode) -> None:
    train = knn_cfg.DATASETS.TRAIN
    knn_cfg.DATASETS.TRAIN = ("synthetic:num_images=2",)
    settings = {"k": 7, "temperature": 0.5, "num_patches": 50, "balanced": True, "seed": 3}
    for name, value in {"train": train, "memory_mib": 11, **settings}.items():
        knn_cfg.merge_from_list([f"TEST.DENSE_KNN.{name.upper()}", value])
    (evaluator,) = build_evaluator(knn_cfg, knn_cfg.DATASETS.TEST[0]).evaluators
    assert evaluator.protocol() == {"dense_knn": {**settings, "num_train_images": 10}}
    assert evaluator.memory_mib == 11  # type: ignore[attr-defined]


def test_features_that_are_not_finite_name_the_images(knn_cfg: CfgNode) -> None:
    """In the test set: a NaN has no neighbours, and an error in the search would be one of this process alone."""

    class BrokenLater(ColourPatches):
        broken = False

        def forward(self, images: torch.Tensor) -> BackboneOutput:
            output = super().forward(images)
            if self.broken:
                output.patch_tokens[1] = torch.nan
            return output

    model = BrokenLater()
    test = knn_cfg.DATASETS.TEST[0]
    evaluator = build_evaluator(knn_cfg, test)
    evaluator.prepare(model)
    evaluator.reset()
    model.broken = True
    for batch in build_test_loader(knn_cfg, test):
        evaluator.process(batch, model(batch.images))
    with pytest.raises(ValueError, match=r"features of \d of 6 images are not finite, e\.g\. .*/test/images/01\.png"):
        evaluator.evaluate()
