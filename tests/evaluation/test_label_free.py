"""Label-free metrics against numpy, known spectra and cases that are clear by themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.engine import SSLTrainer
from dinoengine.evaluation import LabelFreeEvaluator, inference_on_dataset, power_law_exponent, rankme
from dinoengine.modeling import build_model
from dinoengine.modeling.meta_arch import PrototypeHead
from tests.evaluation.fakes import LinearFeatures, identity_features, make_loader

D = 16


def _evaluate(
    features: Tensor, head: PrototypeHead | None = None, ranks: tuple[int, int] = (4, 50)
) -> dict[str, float]:
    model: LinearFeatures = identity_features(features.shape[1])
    model.prototype_head = head  # type: ignore[assignment]
    loader = make_loader(features, None, batch_size=7)
    return inference_on_dataset(model, loader, LabelFreeEvaluator(ranks))["label_free"]


def _random(num: int = 100, dim: int = D) -> Tensor:
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(2)) @ mixing + 3.0


@pytest.mark.parametrize("num", [100, 9])  # more and fewer images than dimensions
def test_rank_and_spread_are_those_of_numpy_on_all_features(num: int) -> None:
    features = _random(num).numpy().astype(np.float64)
    p = np.linalg.svd(features, compute_uv=False)
    p = p / p.sum() + 1e-7
    expected = math.exp(-(p * np.log(p)).sum())
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    got = _evaluate(_random(num))
    assert got["rankme"] == pytest.approx(expected, rel=1e-6)
    assert got["rankme_share"] == pytest.approx(expected / min(num, D), rel=1e-6)
    assert got["feature_std"] == pytest.approx(directions.std(0).mean(), rel=1e-6)
    assert got["feature_std_relative"] == pytest.approx(directions.std(0).mean() * math.sqrt(D), rel=1e-6)


def test_rankme_of_known_spectra() -> None:
    assert rankme(torch.ones(8, dtype=torch.float64)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.tensor([3.0, 3.0, 0.0, 0.0])) == pytest.approx(2, rel=1e-4)
    assert rankme(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    spectrum = 7.0 * torch.arange(1, 101, dtype=torch.float64) ** -alpha
    assert power_law_exponent(spectrum.flip(0), (4, 50)) == pytest.approx(alpha, abs=1e-9)
    bent = torch.cat((spectrum[:50], spectrum[50:] * 1e-3))
    assert power_law_exponent(bent, (4, 50)) == pytest.approx(alpha, abs=1e-9)
    bent[:3] *= 100
    assert power_law_exponent(bent, (4, 50)) == pytest.approx(alpha, abs=1e-9)


def test_the_exponent_is_the_weighted_least_squares_of_numpy() -> None:
    features = _random()
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(features.numpy().astype(np.float64).T, bias=True)))[::-1]
    rank = np.arange(2, 11)
    expected = -np.polyfit(np.log(rank), np.log(spectrum[1:10]), 1, w=np.sqrt(1 / rank))[0]
    assert _evaluate(features, ranks=(2, 10))["alpha"] == pytest.approx(expected, rel=1e-6)


def test_ranks_that_rounding_hides_are_not_fitted() -> None:
    spectrum = torch.tensor([1.0, 0.5, 0.25, 0.125, 1e-30, -1e-20, 0.0])
    assert math.isnan(power_law_exponent(spectrum, (4, 50)))
    assert math.isfinite(power_law_exponent(spectrum, (2, 50)))
    assert math.isnan(power_law_exponent(torch.zeros(10), (1, 10)))


def test_constant_features() -> None:
    got = _evaluate(torch.full((20, D), 0.3))
    assert got["rankme"] == pytest.approx(1, abs=1e-3)
    assert got["feature_std_relative"] < 1e-12
    assert math.isnan(got["alpha"])


def test_features_on_one_line_have_rank_1_however_far_they_spread() -> None:
    line = torch.linspace(-1, 1, 20)[:, None] * torch.ones(D)
    got = _evaluate(line)
    assert got["rankme"] == pytest.approx(1, abs=1e-3)
    assert got["feature_std_relative"] == pytest.approx(1.0)  # two opposite directions


def test_features_over_the_whole_sphere_have_relative_spread_1() -> None:
    axes = torch.cat((torch.eye(D), -torch.eye(D)))
    got = _evaluate(axes)
    assert got["feature_std"] == pytest.approx(1 / math.sqrt(D))
    assert got["rankme"] == pytest.approx(D, rel=1e-4)


def _head(table: list[list[float]]) -> PrototypeHead:
    """Assigns an image by its first pixel, a row of the table."""
    rows = torch.tensor(table)
    return PrototypeHead(lambda cls_tokens: rows[cls_tokens[:, 0].long()], lambda: 0.05)


def test_prototypes_by_hand() -> None:
    head = _head([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.25, 0.75, 0.0]])
    which = torch.tensor([0.0, 1.0, 1.0, 2.0])
    got = _evaluate(torch.cat((which[:, None], torch.randn(4, D - 1)), dim=1), head)
    assert got["prototype_usage"] == 3 / 4
    mean = np.array([0.5, 2.75, 0.75]) / 4
    assert got["prototype_perplexity"] == pytest.approx(math.exp(-(mean * np.log(mean)).sum()))
    entropy = (math.log(2) + (0.25 * math.log(4) + 0.75 * math.log(4 / 3))) / 4
    assert got["teacher_entropy"] == pytest.approx(entropy)
    assert got["teacher_entropy_relative"] == pytest.approx(entropy / math.log(4))
    assert got["teacher_temp"] == 0.05


def test_uniform_targets_and_a_single_prototype() -> None:
    features = torch.zeros(5, D)
    uniform = _evaluate(features, _head([[0.25] * 4]))
    assert uniform["teacher_entropy_relative"] == pytest.approx(1)
    assert uniform["prototype_perplexity"] == pytest.approx(4)
    single = _evaluate(features, _head([[0.0, 1.0, 0.0, 0.0]]))
    assert (single["prototype_usage"], single["prototype_perplexity"]) == (1 / 4, 1)
    assert single["teacher_entropy"] == 0
    assert _evaluate(features, _head([[1.0]]))["teacher_entropy_relative"] == 1.0


def test_a_bare_backbone_has_no_figures_about_prototypes() -> None:
    assert _evaluate(_random()).keys() == {"rankme", "rankme_share", "alpha", "feature_std", "feature_std_relative"}


def test_images_with_broken_features_are_named_and_each_must_come_once() -> None:
    features = _random()
    features[42, 3] = math.nan
    with pytest.raises(ValueError, match=r"features of 1 of 100 images are not finite, e\.g\. images number \[42\]"):
        _evaluate(features)
    loader = make_loader(_random(6), None, order=[0, 1, 2, 3, 4, 4])
    with pytest.raises(ValueError, match="every image of the dataset exactly once"):
        inference_on_dataset(identity_features(D), loader, LabelFreeEvaluator())


def test_a_second_evaluation_starts_anew() -> None:
    evaluator, model = LabelFreeEvaluator(), identity_features(D)
    first = inference_on_dataset(model, make_loader(_random(), None), evaluator)
    inference_on_dataset(model, make_loader(torch.ones(5, D), None), evaluator)
    assert inference_on_dataset(model, make_loader(_random(), None), evaluator) == first
    assert evaluator.protocol() == {"label_free": {"features": "cls", "alpha_ranks": [4, 50]}}


def test_a_plain_folder_and_no_training_set_are_enough(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i, 90, 20)).save(tmp_path / f"{i}.png")
    tiny_cfg.merge_from_list(["DATASETS.TRAIN", "()", "DATASETS.TEST", f"folder:{tmp_path}"])
    tiny_cfg.merge_from_list(["TEST.EVALUATORS", "('label_free',)", "MODEL.TEACHER.TEMP", 0.2])
    model = build_model(tiny_cfg)
    results = SSLTrainer.test(tiny_cfg, model)["label_free"]
    assert 1 <= results["rankme"] <= 5
    assert results["teacher_temp"] == 0.2

    images = next(iter(build_test_loader(tiny_cfg, f"folder:{tmp_path}"))).images
    with torch.no_grad():
        logits = model.teacher["dino_head"](model.teacher["backbone"](model.pixel_norm(images)).cls_token)  # type: ignore[index]
    p = (logits.double() / 0.2).softmax(1)
    assert results["teacher_entropy"] == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert results["prototype_usage"] == len(set(p.argmax(1).tolist())) / 16
