from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dinoengine.evaluation import average_precision, eleven_point_average_precision


@pytest.mark.parametrize("num_scores", [2, 10, 1000])
def test_average_precision_is_that_of_scikit_learn(num_scores: int) -> None:
    """Few different scores: many ties."""
    rng = np.random.default_rng(num_scores)
    for size in (1, 2, 17, 60):
        scores, positive = rng.integers(num_scores, size=size) / 7 - 1, rng.random(size) < 0.3
        positive[rng.integers(size)] = True
        assert average_precision(scores, positive) == pytest.approx(
            average_precision_score(positive, scores), abs=1e-12
        )


def test_eleven_points_by_hand() -> None:
    """Precision at a positive image is 1 at the first rank, 2/3 if the second is at rank 3, 3/5 if the third is at 5."""
    scores = np.array([0.1, 0.9, 0.5, 0.2, 0.7, 0.3])
    positive = np.array([False, True, True, False, False, True])  # ranks 1, 3, 4: 3/4 at rank 4 is better than 2/3
    assert eleven_point_average_precision(scores, positive) == pytest.approx((4 * 1 + 7 * 3 / 4) / 11)
    positive = np.array([False, True, True, True, False, False])  # ranks 1, 3, 5
    assert eleven_point_average_precision(scores, positive) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_a_recall_of_exactly_three_tenths_counts_there() -> None:
    """3 positive images, 7 others, 7 positive: 0.1 * 3 in floats is above 3 / 10."""
    positive = np.array([True] * 3 + [False] * 7 + [True] * 7)
    scores = -np.arange(17.0)
    assert eleven_point_average_precision(scores, positive) == pytest.approx((4 * 1 + 7 * 10 / 17) / 11)


def test_equal_scores_are_retrieved_together_in_any_order() -> None:
    positive = np.array([True, False, False, False])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        for measure in (average_precision, eleven_point_average_precision):
            assert measure(np.zeros(4), positive[order]) == pytest.approx(0.25)


def test_perfect_and_worst_ranking() -> None:
    positive = np.array([True, True, False, False, False])
    for measure in (average_precision, eleven_point_average_precision):
        assert measure(np.array([5.0, 4, 3, 2, 1]), positive) == 1.0
    assert average_precision(np.array([1.0, 2, 3, 4, 5]), positive) == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert eleven_point_average_precision(np.array([1.0, 2, 3, 4, 5]), positive) == pytest.approx(2 / 5)


@pytest.mark.parametrize("measure", [average_precision, eleven_point_average_precision])
def test_nothing_positive_is_an_error(measure: object) -> None:
    with pytest.raises(ValueError, match="needs a positive image, and there is none among 3"):
        measure(np.arange(3.0), np.zeros(3, dtype=bool))  # type: ignore[operator]
