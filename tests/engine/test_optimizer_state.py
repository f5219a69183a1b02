"""Moments find their parameter by name, and what is not there is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.engine.optimizer_state import load_optimizer_state, optimizer_state


def _optimizer(*, unused: bool = False) -> torch.optim.AdamW:
    """After one step of two parameters and, if ``unused``, none of a third one."""
    parameters = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(4))}
    loss = sum(p.square().sum() for p in parameters.values())
    if unused:
        parameters["c"] = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW(list(parameters.items()), lr=0.1)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    return optimizer


def _without(state: dict[str, Any], index: int, *keys: str) -> dict[str, Any]:
    entry = {key: value for key, value in state["state"][index].items() if key not in keys}
    others = {i: value for i, value in state["state"].items() if i != index}
    return {**state, "state": {**others, **({index: entry} if keys else {})}}


@pytest.mark.parametrize(
    ("keys", "named"), [((), r"moments of b\."), (("exp_avg", "step"), r"of b \(exp_avg\), b \(step\)\.")]
)
def test_missing_moments_of_a_parameter_are_named(keys: tuple[str, ...], named: str) -> None:
    optimizer = _optimizer()
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(ValueError, match=f"{named} Resume from another checkpoint"):
        load_optimizer_state(optimizer, _without(optimizer_state(_optimizer()), 1, *keys))
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)


def test_moments_of_another_shape_are_named() -> None:
    state = optimizer_state(_optimizer())
    state["state"][0]["exp_avg"] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"a \(exp_avg: shape \[3, 2\], expected \[2, 3\]\)"):
        load_optimizer_state(_optimizer(), state)


def test_a_parameter_that_never_had_a_step_has_none_to_lose() -> None:
    state = optimizer_state(_optimizer(unused=True))
    assert state["without_moments"] == ["c"]
    target = _optimizer(unused=True)
    load_optimizer_state(target, state)
    assert set(target.state_dict()["state"]) == {0, 1}
    with pytest.raises(ValueError, match=r"moments of b\."):
        load_optimizer_state(target, _without(state, 1))


def test_a_state_before_the_first_step_loads() -> None:
    parameter = nn.Parameter(torch.ones(2))
    fresh = optimizer_state(torch.optim.AdamW([("a", parameter)]))
    target = torch.optim.AdamW([("a", nn.Parameter(torch.ones(2)))])
    load_optimizer_state(target, fresh)
    assert target.state_dict()["state"] == {}
