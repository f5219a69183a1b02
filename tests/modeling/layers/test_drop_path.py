"""Stochastic depth by skipping samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.layers.drop_path import KeptSamples, add_kept, draw_kept, take_kept


def add_residual(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """As a block does it for one group."""
    kept = draw_kept(len(x), rate, x.device)
    return add_kept(x, branch(take_kept(x, kept)), kept)


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(8, 0.5, 4), (10, 0.3, 7), (3, 0.4, 1), (2, 0.4, 1), (1, 0.9, 1), (5, 0.01, 4)]
)
def test_exactly_so_many_samples_run_and_are_scaled_up(batch: int, rate: float, kept: int) -> None:
    x = torch.zeros(batch, 2, 3)
    seen = []

    def branch(y: torch.Tensor) -> torch.Tensor:
        seen.append(len(y))
        return torch.ones_like(y)

    out = add_residual(x, branch, rate)
    assert seen == [kept]
    values = out[:, 0, 0]
    assert (values != 0).sum() == kept
    torch.testing.assert_close(values[values != 0], torch.full((kept,), batch / kept))


def test_a_kept_sample_gets_its_own_residual() -> None:
    x = torch.arange(6.0).view(6, 1, 1)
    out = add_residual(x, lambda y: 10 * y, 0.5)
    changed = (out - x).flatten()
    assert all(c in (0.0, 20.0 * i) for i, c in enumerate(changed.tolist()))


def test_the_mean_over_draws_is_the_plain_sum() -> None:
    x = torch.zeros(5, 1, 1)
    torch.manual_seed(0)
    mean = sum(add_residual(x, torch.ones_like, 0.4) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, torch.ones(5, 1, 1), atol=0.05, rtol=0)


def test_rate_0_is_the_plain_sum_without_a_draw() -> None:
    x = torch.randn(4, 2, 3)
    before = torch.get_rng_state()
    assert torch.equal(add_residual(x, lambda y: y * 2, 0.0), x + x * 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sum_has_the_gradients_of_torch_and_keeps_indices_alone() -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(n, 3, 4, requires_grad=True) for n in (6, 4))
    kept = KeptSamples(torch.tensor([5, 0, 3, 1]), 1.5)
    weights = torch.randn(6, 3, 4)
    plain = x.index_add(0, kept.indices, residual, alpha=kept.scale)
    expected = torch.autograd.grad((plain * weights).sum(), (x, residual))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = add_kept(x, residual, kept)
    assert torch.equal(out, plain)
    assert [t.dtype for t in saved] == [torch.int64]
    for got, wanted in zip(torch.autograd.grad((out * weights).sum(), (x, residual)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_16_bit_residual_keeps_the_stream_in_fp32() -> None:
    x = torch.full((2, 1, 1), 0.02)
    out = add_residual(x, lambda y: (y * 0 + 1e-5).bfloat16(), 0.5)
    assert out.dtype == torch.float32
    assert (out != x).any()  # 0.02 + 2e-5 would round back to 0.02 in bf16
