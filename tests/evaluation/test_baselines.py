from __future__ import annotations

import pytest
import torch

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import Features, KNNSettings, knn_accuracy, pixel_knn_accuracy
from tests.evaluation.fakes import make_loader


def _cfg(*overrides: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.KNN.K=(3, 7)", "TEST.KNN.TEMPERATURE=0.2", *overrides])
    return cfg


def test_the_mean_of_the_training_set_is_taken_off_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.rand(30, 4, generator=generator) + 9.0, torch.rand(20, 4, generator=generator) + 9.2
    bank_labels, query_labels = torch.arange(30) % 4, torch.arange(20) % 4
    mean = bank.mean(dim=0)
    expected = knn_accuracy(
        Features(bank - mean, bank_labels), Features(queries - mean, query_labels), KNNSettings((3, 7), 0.2)
    )
    actual = pixel_knn_accuracy(_cfg(), make_loader(bank, bank_labels), make_loader(queries, query_labels))
    assert actual == expected
    assert actual != knn_accuracy(
        Features(bank, bank_labels), Features(queries, query_labels), KNNSettings((3, 7), 0.2)
    )


def test_brightness_alone_tells_classes_apart_only_after_centring() -> None:
    # Grey images of brightness 10 (class 0) and 20 (class 1): parallel as they are, opposite around their mean.
    bank, labels = torch.tensor([[10.0, 10.0], [20.0, 20.0]]), torch.tensor([0, 1])
    queries = torch.tensor([[11.0, 11.0], [19.0, 19.0], [12.0, 12.0]])
    result = pixel_knn_accuracy(
        _cfg("TEST.KNN.K=1"), make_loader(bank, labels), make_loader(queries, torch.tensor([0, 1, 0]))
    )
    assert result == {"top1_k1": 100.0}


def test_without_labels_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"the test set has none\. Give labelled datasets"):
        pixel_knn_accuracy(_cfg(), make_loader(torch.eye(2), torch.arange(2)), make_loader(torch.eye(2), None))


def test_pixels_of_the_digits_are_a_strong_baseline() -> None:
    pytest.importorskip("sklearn")
    cfg = _cfg("DATALOADER.NUM_WORKERS=0", "INPUT.FORMAT=L", "INPUT.TEST.RESIZE_PX=0", "INPUT.TEST.CROP_SIZE_PX=8")
    cfg.merge_from_list(["TEST.KNN.K=(10, 20)", "TEST.KNN.TEMPERATURE=0.07"])
    loaders = [build_test_loader(cfg, f"digits:split={split}") for split in ("train", "test")]
    result = pixel_knn_accuracy(cfg, *loaders)
    # Independent of this code: scikit-learn's 10-NN with the same cosine weights on mean-centred pixels.
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    data, target = load_digits(return_X_y=True)
    pixels = (data * 255 / 16).round() // 1
    pixels -= pixels[:1437].mean(axis=0)
    classifier = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda d: torch.exp(torch.from_numpy(1 - d) / 0.07).numpy()
    )
    expected = 100.0 * classifier.fit(pixels[:1437], target[:1437]).score(pixels[1437:], target[1437:])
    assert result["top1_k10"] == pytest.approx(expected, abs=0.3)  # one image of 360 may fall on the other side
    assert result["top1_k10"] > 90
