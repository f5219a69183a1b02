from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from dinoengine.evaluation.confusion import ConfusionMatrix, iou_per_class, log_iou_per_class, segmentation_scores
from dinoengine.structures import IGNORE


def _scores(answers: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(answers.long(), num_classes).movedim(-1, 1).float()


def test_miou_by_hand() -> None:
    """Two images of 2 x 2, three classes.

    class 0: 3 pixels, 2 right, no other answered 0 -> 2 / 3; class 1: 2 pixels, 1 right, 1 pixel of class 0 answered
    1 -> 1 / 3; class 2 has no pixel and one answer (a pixel of class 1): it does not count, and its answer is wrong.
    """
    masks = torch.tensor([[[0, 0], [0, IGNORE]], [[1, 1], [IGNORE, IGNORE]]], dtype=torch.uint8)
    answers = torch.tensor([[[0, 0], [1, 2]], [[1, 2], [0, 1]]])
    matrix = ConfusionMatrix(3)
    matrix.add(_scores(answers, 3), masks, torch.arange(2))
    counts = matrix.finish()
    assert counts.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    ious = iou_per_class(counts).tolist()
    assert ious[:2] == pytest.approx([2 / 3, 1 / 3])
    assert math.isnan(ious[2])
    assert segmentation_scores(counts) == {"miou": pytest.approx(50.0), "pixel_accuracy": pytest.approx(60.0)}


def test_it_is_what_scikit_learn_says_batch_by_batch() -> None:
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(5)
    masks = rng.choice([0, 1, 2, 3, 4, IGNORE], (7, 6, 5)).astype(np.uint8)
    answers = rng.integers(0, 5, masks.shape)
    for part in ([0, 1, 2], [3, 4, 5, 6]):
        matrix.add(_scores(torch.tensor(answers[part]), 5), torch.tensor(masks[part]), torch.tensor(part))
    counts = matrix.finish()
    known = masks != IGNORE
    assert np.array_equal(counts.numpy(), confusion_matrix(masks[known], answers[known]))
    expected = jaccard_score(masks[known], answers[known], average=None)
    assert iou_per_class(counts).numpy() == pytest.approx(expected)
    assert segmentation_scores(counts)["miou"] == pytest.approx(100 * expected.mean())


def test_scores_are_interpolated_before_they_are_compared() -> None:
    """Of a row with scores 1 and 0 for class 0 the four pixels have 1, 0.75, 0.25, 0; class 1 has 0.6 throughout."""
    scores = torch.tensor([[[[1.0, 0.0]], [[0.6, 0.6]]]])
    matrix = ConfusionMatrix(2)
    matrix.add(scores, torch.tensor([[[0, 0, 0, 0]]], dtype=torch.uint8), torch.tensor([0]))
    assert matrix.finish().tolist() == [[2, 2], [0, 0]]


def test_what_means_nothing_is_an_error() -> None:
    matrix = ConfusionMatrix(2)
    ignored = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    matrix.add(torch.zeros(1, 2, 1, 1), ignored, torch.tensor([0]))
    with pytest.raises(ValueError, match="No pixel of the masks of the test set has a class"):
        matrix.finish()
    matrix.add(torch.full((1, 2, 1, 1), torch.nan), ignored * 0, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"images number \[4\]"):
        matrix.finish()


def test_the_table_names_the_classes_that_are_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dinoengine"):
        log_iou_per_class(torch.tensor([[2, 1, 0], [0, 1, 1], [0, 0, 0]]), ["sky", "tree", "car"], "Probe")
    lines = [line.split() for line in caplog.messages[0].splitlines()]
    assert ["sky", "66.67", "3"] in lines
    assert ["tree", "33.33", "2"] in lines
    assert not any("car" in line for line in lines)
