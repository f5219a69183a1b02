"""KoLeo against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.losses import koleo_loss


def _features(rows: int = 6, width: int = 3) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _slow(features: Tensor, group: int) -> float:
    points = [row / row.norm() for row in features]
    total = 0.0
    for i, point in enumerate(points):
        start = i // group * group
        others = [points[j] for j in range(start, start + group) if j != i]
        total -= math.log(min(float((point - other).norm()) for other in others) + 1e-8)
    return total / len(points)


@pytest.mark.parametrize("group", [0, 2, 3, 6])
def test_equals_the_slow_loop(group: int) -> None:
    assert koleo_loss(_features(), group).item() == pytest.approx(_slow(_features(), group or 6))


def test_by_hand() -> None:
    # Opposite points of the sphere are 2 apart, whatever their length.
    assert koleo_loss(torch.tensor([[3.0, 0.0], [-0.1, 0.0]])).item() == pytest.approx(-math.log(2))


def test_the_gradient_is_right_through_both_points() -> None:
    features = _features().requires_grad_()
    assert torch.autograd.gradcheck(koleo_loss, (features,))


def test_permuting_the_batch_changes_nothing() -> None:
    features = _features()
    torch.testing.assert_close(koleo_loss(features[[3, 0, 5, 1, 4, 2]]), koleo_loss(features))


def test_exact_duplicates_have_a_finite_gradient() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8))
    assert torch.isfinite(features.grad).all()


def test_one_image_has_no_neighbour() -> None:
    features = torch.ones(1, 3, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(features.grad, torch.zeros(1, 3))


@pytest.mark.parametrize(("width", "constant"), [(8, 17.1), (384, 15.4), (1024, 14.9)])
def test_the_published_distance_differs_only_where_points_coincide(width: int, constant: float) -> None:
    """It adds 1e-8 to every coordinate of the difference, and 1e-8 to the distance."""
    published = torch.nn.PairwiseDistance(2, eps=1e-8)
    points = torch.nn.functional.normalize(_features(2, width), dim=1)
    expected = -(published(points[:1], points[1:]) + 1e-8).log().item()
    assert koleo_loss(points).item() == pytest.approx(expected, abs=1e-6)
    alone = -(published(points[:1], points[:1]) + 1e-8).log().item()
    assert alone == pytest.approx(constant, abs=0.05)


def test_half_precision_and_autocast_are_computed_in_fp32() -> None:
    features = _features().bfloat16()
    expected = koleo_loss(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = koleo_loss(features)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="KOLEO_GROUP_SIZE 4 does not divide the 6 images"):
        koleo_loss(_features(), 4)


def test_neighbours_are_found_where_all_points_are_close() -> None:
    """As early in training: in fp32 the products of the points themselves differ by less than their rounding."""
    generator = torch.Generator().manual_seed(0)
    points = torch.ones(64, 16) + 3e-4 * torch.randn(64, 16, generator=generator)
    exact = torch.nn.functional.normalize(points.double(), dim=-1)
    distances = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist") + 9 * torch.eye(64)
    expected = -(distances.min(1).values + 1e-8).log().mean()
    torch.testing.assert_close(koleo_loss(points).double(), expected, rtol=1e-3, atol=0)
