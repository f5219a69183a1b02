from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dinoengine.solver.clipping import clip_grad_norms_


def _parameter(gradient: list[float] | None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(gradient or [0.0])))
    if gradient is not None:
        parameter.grad = torch.tensor(gradient)
    return parameter


def test_norm_is_that_of_the_whole_group_and_gradients_keep_their_direction() -> None:
    first, second = _parameter([2.0, 3.0]), _parameter([6.0])  # norm 7
    norms = clip_grad_norms_({"backbone": [first, second]}, 3.5)
    assert norms["backbone"].item() == pytest.approx(7.0)
    torch.testing.assert_close(first.grad, torch.tensor([1.0, 1.5]), rtol=1e-5, atol=0)
    torch.testing.assert_close(second.grad, torch.tensor([3.0]), rtol=1e-5, atol=0)


def test_groups_are_clipped_apart() -> None:
    small, large = _parameter([0.3, 0.4]), _parameter([300.0, 400.0])
    norms = clip_grad_norms_({"backbone": [small], "dino_head": [large]}, 1.0)
    assert norms["backbone"].item() == pytest.approx(0.5)
    assert norms["dino_head"].item() == pytest.approx(500.0)
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]), rtol=0, atol=0)  # within the limit: untouched
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 1e9])
def test_zero_only_measures_and_a_high_limit_changes_nothing(max_norm: float) -> None:
    parameter = _parameter([3e4, -4e4])
    assert clip_grad_norms_({"all": [parameter]}, max_norm)["all"].item() == pytest.approx(5e4)
    torch.testing.assert_close(parameter.grad, torch.tensor([3e4, -4e4]), rtol=0, atol=0)


def test_parameters_without_gradient_are_passed_over() -> None:
    frozen, trained = _parameter(None), _parameter([3.0, 4.0])
    norms = clip_grad_norms_({"some": [frozen, trained], "none": [frozen], "empty": []}, 1.0)
    assert norms["some"].item() == pytest.approx(5.0)
    assert norms["none"].item() == 0.0
    assert norms["empty"].item() == 0.0
    assert frozen.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_is_visible_in_its_group_only(bad: float) -> None:
    healthy, broken = _parameter([3.0, 4.0]), _parameter([bad, 1.0])
    norms = clip_grad_norms_({"healthy": [healthy], "broken": [broken]}, 1.0)
    assert not math.isfinite(norms["broken"].item())
    assert norms["healthy"].item() == pytest.approx(5.0)
    torch.testing.assert_close(healthy.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def _slow_norm(parameters: list[nn.Parameter]) -> float:
    values = [v for p in parameters if p.grad is not None for v in p.grad.double().flatten().tolist()]
    return math.sqrt(sum(v**2 for v in values))


def test_norm_matches_a_float64_loop_over_random_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(3, 5), (7,), (2, 2, 2), ()]]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10
    expected = _slow_norm(parameters)
    assert clip_grad_norms_({"all": parameters}, 2.0)["all"].item() == pytest.approx(expected, rel=1e-6)
    assert _slow_norm(parameters) == pytest.approx(2.0, rel=1e-5)
