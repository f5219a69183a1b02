from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dinoengine.config import CfgNode
from dinoengine.data import DATASET_REGISTRY, ImageDataset
from dinoengine.evaluation import ClassificationEvaluator, build_evaluator, inference_on_dataset
from dinoengine.evaluation.classification import ranks_of
from dinoengine.structures import BackboneOutput, ClassifierOutput
from tests.evaluation.fakes import identity_features, make_loader


class PixelLogits(nn.Module):
    """The pixels are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> BackboneOutput:
        logits = images.flatten(1) * self.scale
        nothing = logits[:, None][:, :0]
        return ClassifierOutput(logits, nothing, nothing, (0, 0), logits=logits)


def _evaluate(logits: Tensor, labels: Tensor, classes: Sequence[int] | None = None) -> dict[str, float]:
    evaluator = ClassificationEvaluator(logits.shape[1], classes)
    results: dict[str, float] = inference_on_dataset(PixelLogits(), make_loader(logits, labels), evaluator)[
        "classification"
    ]
    return results


def test_ranks_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]] * 3 + [[0.0, 0.0, 0.0]] * 3 + [[1.0, math.nan, 0.0], [1.0, math.inf, 0.0]])
    ranks = ranks_of(logits, torch.tensor([0, 1, 2, 0, 1, -1, 0, 1]))
    assert ranks[:6].tolist() == [0, 2, 1, 0, 1, 3]  # of equal logits the first class comes first
    assert ranks[6:].isnan().all()


def test_accuracies_are_exact() -> None:
    """Image i has its right class at place i: one of eight is top-1, five are top-5."""
    logits = torch.stack([torch.arange(8.0).roll(i + 1) for i in range(8)])  # the largest stands at column i
    labels = torch.tensor([logits[i].argsort(descending=True)[i].item() for i in range(8)])
    assert _evaluate(logits, labels) == {"top1": 12.5, "top5": 62.5}
    assert _evaluate(logits[:7], labels[:7]) == {"top1": 100 / 7, "top5": 500 / 7}


def test_top5_needs_more_than_five_classes() -> None:
    assert _evaluate(torch.eye(5), torch.arange(5)) == {"top1": 100.0}


def test_a_head_that_says_nothing_is_at_chance() -> None:
    assert _evaluate(torch.zeros(12, 6), torch.arange(12) % 6) == {
        "top1": pytest.approx(100 / 6),
        "top5": pytest.approx(500 / 6),
    }


def test_classes_are_translated() -> None:
    """The test set calls the head's class 2 its 0, and has a class 1 that the head does not know."""
    logits = torch.eye(3)[[2, 0, 0, 2]]
    assert _evaluate(logits, torch.tensor([0, 1, 2, 2]), [2, -1, 0]) == {"top1": 50.0}


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 of 3 images are not finite, e\.g\. images number \[1\]"):
        _evaluate(torch.eye(3) / torch.tensor([1.0, 0.0, 1.0])[:, None], torch.arange(3))


def test_a_model_without_a_head_and_a_set_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a model with a head"):
        inference_on_dataset(
            identity_features(3), make_loader(torch.eye(3), torch.arange(3)), ClassificationEvaluator(3)
        )
    with pytest.raises(ValueError, match="needs labels, and the test set has none"):
        inference_on_dataset(PixelLogits(), make_loader(torch.eye(3), None), ClassificationEvaluator(3))


class Named(ImageDataset):
    """Three black images of each class."""

    def __init__(self, names: str = "") -> None:
        self.class_names = names.split("+") if names else None

    def __len__(self) -> int:
        return 3 * len(self.class_names or [""])

    def label(self, index: int) -> int | None:
        return index // 3 if self.class_names else None

    def load(self, index: int) -> object:
        raise AssertionError("only names are needed")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "named", Named)


def _built(cfg: CfgNode, train: str, test: str) -> ClassificationEvaluator:
    cfg.merge_from_list(["DATASETS.TRAIN", f"named:names={train}" if train else "()"])
    (evaluator,) = build_evaluator(cfg, f"named:names={test}").evaluators
    assert isinstance(evaluator, ClassificationEvaluator)
    return evaluator


def test_classes_meet_by_name(classifier_cfg: CfgNode, named: None) -> None:
    assert _built(classifier_cfg, "ant+bee+cat", "ant+bee+cat").classes == [0, 1, 2]
    assert _built(classifier_cfg, "ant+bee+cat", "bee+cat").classes == [1, 2]
    assert _built(classifier_cfg, "ant+bee+cat", "bee+dog+ant").classes == [1, -1, 0]
    assert _built(classifier_cfg, "", "x+y+z").classes is None


def test_sets_that_do_not_fit_the_head_are_refused(classifier_cfg: CfgNode, named: None) -> None:
    with pytest.raises(ValueError, match="have no class in common"):
        _built(classifier_cfg, "ant+bee+cat", "dog+emu")
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 3, but DATASETS\.TRAIN .* has 2 classes"):
        _built(classifier_cfg, "ant+bee", "ant+bee")
    with pytest.raises(ValueError, match=r"has 2 classes\. Name the training set in DATASETS\.TRAIN"):
        _built(classifier_cfg, "", "ant+bee")
    with pytest.raises(ValueError, match=r"needs labels, and the test set 'named:names=' has none"):
        _built(classifier_cfg, "ant+bee+cat", "")
    classifier_cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    with pytest.raises(ValueError, match=r"is for a classifier, and MODEL\.CLASSIFIER\.NUM_CLASSES is 0; use knn"):
        _built(classifier_cfg, "ant+bee+cat", "ant+bee+cat")
