"""Moments of rows that were never all in memory, against numpy on all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinoengine.evaluation import Moments


def _rows(num: int = 50, dim: int = 4, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(num), dtype=torch.float64) + offset


@pytest.mark.parametrize("diagonal", [False, True])
def test_any_cut_into_batches_gives_the_moments_of_all_rows(diagonal: bool) -> None:
    rows = _rows()
    moments = Moments(diagonal=diagonal)
    for part in rows.split([1, 7, 0, 42]):
        moments.add(part)
    covariance, gram = np.cov(rows.T, bias=True), (rows.T @ rows).numpy()
    pick = np.diag if diagonal else np.asarray
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), pick(covariance), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(moments.gram(), pick(gram), rtol=1e-12)
    joined = moments.of_all_processes()  # of one process: the same
    np.testing.assert_allclose(joined.scatter, moments.scatter, rtol=1e-12)
    assert joined.count == 50


def test_a_large_mean_costs_no_digits() -> None:
    """With sums of squares the variance would be wrong in its first digit."""
    moments = Moments()
    for part in _rows(offset=1e8).split(5):
        moments.add(part)
    np.testing.assert_allclose(moments.covariance(), np.cov(_rows().T, bias=True), rtol=1e-6)


def test_rows_that_are_all_the_same_have_no_scatter() -> None:
    moments = Moments()
    for _ in range(3):
        moments.add(torch.full((5, 2), 0.1))
    assert moments.scatter.abs().max() < 1e-30
