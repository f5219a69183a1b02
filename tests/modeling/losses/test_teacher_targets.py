"""Centring and Sinkhorn-Knopp against slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.losses import Centering, SinkhornKnopp, build_targets


def _logits(rows: int = 6, prototypes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _slow_sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    q = [[float(torch.exp(z / temp)) for z in row] for row in logits]
    rows, prototypes = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(iterations):
        for k in range(prototypes):
            s = sum(q[b][k] for b in range(rows))
            for b in range(rows):
                q[b][k] /= s * prototypes
        for b in range(rows):
            s = sum(q[b])
            q[b] = [v / (s * rows) for v in q[b]]
    return torch.tensor(q, dtype=torch.float64) * rows


@pytest.mark.parametrize(("rows", "prototypes"), [(6, 5), (1, 4), (7, 1), (3, 9)])
def test_sinkhorn_equals_the_slow_loop(rows: int, prototypes: int) -> None:
    logits = _logits(rows, prototypes)
    got = SinkhornKnopp(3)(logits, 0.5)
    torch.testing.assert_close(got, _slow_sinkhorn(logits, 0.5, 3))
    torch.testing.assert_close(got.sum(1), torch.ones(rows, dtype=torch.float64))


def test_sinkhorn_by_hand() -> None:
    # exp gives [[1, 2], [2, 1]] up to a factor: columns and rows have equal sums, so only scaling remains.
    logits = torch.log(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    torch.testing.assert_close(SinkhornKnopp(3)(logits, 1.0), torch.tensor([[1 / 3, 2 / 3], [2 / 3, 1 / 3]]))


def test_sinkhorn_uses_prototypes_equally_when_it_converges() -> None:
    got = SinkhornKnopp(200)(_logits(12, 4), 0.5)
    torch.testing.assert_close(got.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


def test_sinkhorn_leaves_balanced_targets_as_they_are() -> None:
    """Fixed points: rows that sum to 1 and prototypes that are used equally often; among them the uniform ones."""
    balanced = _slow_sinkhorn(_logits(6, 4), 0.5, 500)
    torch.testing.assert_close(balanced.sum(0), torch.full((4,), 6 / 4, dtype=torch.float64))
    torch.testing.assert_close(SinkhornKnopp(3)(balanced.log() * 0.07, 0.07), balanced)
    alike = _logits(1, 5).expand(8, 5)
    torch.testing.assert_close(SinkhornKnopp(3)(alike, 0.04), torch.full((8, 5), 0.2, dtype=torch.float64))


def test_sinkhorn_ignores_a_constant_and_does_not_overflow() -> None:
    logits = _logits()
    torch.testing.assert_close(SinkhornKnopp(3)(logits + 1e3, 0.5), SinkhornKnopp(3)(logits, 0.5))
    huge = SinkhornKnopp(3)(_logits(dtype=torch.float32) * 500, 0.04)
    assert torch.isfinite(huge).all()


def test_sinkhorn_of_a_permuted_batch_is_permuted() -> None:
    logits, order = _logits(), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(SinkhornKnopp(3)(logits[order], 0.1), SinkhornKnopp(3)(logits, 0.1)[order])


def test_no_rows_give_no_rows() -> None:
    empty = torch.zeros(0, 5)
    assert SinkhornKnopp(3)(empty, 0.1).shape == (0, 5)
    centering = Centering(5)
    assert centering(empty, 0.1).shape == (0, 5)
    centering.update(empty)
    assert torch.equal(centering.center, torch.zeros(1, 5))


@pytest.mark.parametrize("make", [SinkhornKnopp, lambda: Centering(5)])
def test_half_precision_is_computed_in_fp32_without_gradient(make) -> None:
    logits = _logits(dtype=torch.float32).bfloat16().requires_grad_()
    got = make()(logits, 0.07)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, make()(logits.float(), 0.07))


def test_centering_is_a_softmax_of_centred_logits_and_excludes_the_batch() -> None:
    centering, logits = Centering(5, momentum=0.9), _logits(dtype=torch.float32)
    before = centering(logits, 0.1)
    torch.testing.assert_close(before, (logits / 0.1).softmax(-1))
    centering.update(logits)
    torch.testing.assert_close(centering.center, 0.1 * logits.mean(0, keepdim=True))
    torch.testing.assert_close(centering(logits, 0.1), ((logits - centering.center) / 0.1).softmax(-1))


def test_the_centre_is_an_exponential_average() -> None:
    centering = Centering(3, momentum=0.8)
    batches = [_logits(4, 3, seed, torch.float32) for seed in range(5)]
    expected = torch.zeros(1, 3)
    for batch in batches:
        centering.update(batch)
        expected = 0.8 * expected + 0.2 * batch.mean(0, keepdim=True)
    torch.testing.assert_close(centering.center, expected)


def test_the_centre_is_part_of_the_state_and_sinkhorn_has_none() -> None:
    assert list(Centering(3).state_dict()) == ["center"]
    assert list(SinkhornKnopp().state_dict()) == []


def test_kinds_are_chosen_by_name() -> None:
    centering = build_targets("centering", 7, center_momentum=0.5, sinkhorn_iters=2)
    sinkhorn = build_targets("sinkhorn_knopp", 7, center_momentum=0.5, sinkhorn_iters=2)
    assert isinstance(centering, Centering)
    assert (centering.center.shape, centering.momentum) == ((1, 7), 0.5)
    assert isinstance(sinkhorn, SinkhornKnopp)
    assert sinkhorn.num_iters == 2
    with pytest.raises(ValueError, match="must be 'centering' or 'sinkhorn_knopp', got 'x'"):
        build_targets("x", 7, center_momentum=0.5, sinkhorn_iters=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_does_not_touch_the_centre(bad: float) -> None:
    centering = Centering(2)
    centering.update(torch.tensor([[1.0, 3.0]]))
    before = centering.center.clone()
    centering.update(torch.tensor([[1.0, bad]]))
    assert torch.equal(centering.center, before)
    centering.update(torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(centering.center, before * 1.9)
