"""What counts as agreement."""

from __future__ import annotations

import pytest
import torch

from dinoengine.checkpoint.parity import Comparison, compare_tensors

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("difference", "scale", "agrees"),
    [
        (1e-4, 0.5, True),  # of values below 1 the difference itself
        (1.1e-4, 0.5, False),
        (1e-3, 10.0, True),
        (1.1e-3, 10.0, False),
        (NAN, 1.0, False),
        (0.0, NAN, False),
        (INF, INF, False),
        (0.0, INF, False),
    ],
)
def test_a_difference_agrees_in_proportion_to_finite_values(difference: float, scale: float, agrees: bool) -> None:
    assert Comparison("it", difference, scale).agrees is agrees


def test_infinite_values_never_agree() -> None:
    finite, infinite = torch.tensor([1.0, 2.0]), torch.tensor([1.0, INF])
    for expected, got in ((infinite, finite), (finite, infinite), (infinite, infinite)):
        assert not compare_tensors("it", expected, got).agrees
    assert compare_tensors("it", finite, finite.clone()).agrees
    assert not compare_tensors("it", finite, finite[:1]).agrees
