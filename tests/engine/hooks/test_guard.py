"""Steps whose loss or gradients are not finite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dinoengine.engine import hooks
from dinoengine.engine.hooks.guard import MAX_FP16_OVERFLOWS_IN_A_ROW
from dinoengine.utils import comm
from tests.engine.toys import OverflowingScaler, ToyData, toy_trainer


def test_allowed_skips_leave_no_trace_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    guard = hooks.NonFiniteGuard(max_skips=2)
    trainer = toy_trainer(ToyData(bad_iters=(1, 3)))
    weights: list[torch.Tensor] = []
    trainer.register_hooks(
        [guard, hooks.CallbackHook(after_step=lambda t: weights.append(t.model.linear.weight.detach().clone()))]
    )
    trainer.train(0, 5)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2])
    assert guard.num_skipped == 2
    assert caplog.text.count("of 2 allowed") == 2


def test_one_more_stops() -> None:
    trainer = toy_trainer(ToyData(bad_iters=(1, 3)))
    trainer.register_hooks([hooks.NonFiniteGuard(max_skips=1)])
    said = r"iteration 3 .*tools/replay_step\.py.*All 1 steps that may be skipped have been\."
    with pytest.raises(FloatingPointError, match=said):
        trainer.train(0, 5)


def test_the_count_survives_a_resume() -> None:
    first = toy_trainer(ToyData(bad_iters=(0,)))
    first.register_hooks([hooks.NonFiniteGuard(max_skips=1)])
    first.train(0, 1)
    second = toy_trainer(ToyData(bad_iters=(0,)))
    second.register_hooks([hooks.NonFiniteGuard(max_skips=1)])
    second.load_state_dict(first.state_dict())
    with pytest.raises(FloatingPointError):
        second.train(1, 2)


def test_overflows_without_end_stop_the_run() -> None:
    trainer = toy_trainer(grad_scaler=OverflowingScaler())
    trainer.register_hooks([hooks.NonFiniteGuard()])
    with pytest.raises(FloatingPointError, match="overflowed in 41 iterations in a row"):
        trainer.train(0, 100)


def test_overflows_go_on_being_counted_after_a_resume() -> None:
    first, second = hooks.NonFiniteGuard(), hooks.NonFiniteGuard()
    first.load_state_dict({"num_skipped": 0})  # as older checkpoints have it
    first.trainer = SimpleNamespace(step_is_finite=False, is_fp16_overflow=True, describe_non_finite=str)  # type: ignore[assignment]
    for _ in range(MAX_FP16_OVERFLOWS_IN_A_ROW):
        first.before_optimizer_step()
    second.trainer = first.trainer
    second.load_state_dict(first.state_dict())
    with pytest.raises(FloatingPointError, match=f"{MAX_FP16_OVERFLOWS_IN_A_ROW + 1} iterations in a row"):
        second.before_optimizer_step()


def test_the_loss_of_another_rank_decides_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp16, a NaN loss elsewhere is no overflow here: all ranks skip, or all go on."""

    class Scaler:
        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            return loss

        def unscale_(self, optimizer: object) -> None: ...
        def step(self, optimizer: object) -> None: ...
        def update(self) -> None: ...

    monkeypatch.setattr(comm, "all_reduce_max", lambda t: torch.ones_like(t) if t.shape == (2,) else t)
    guard = hooks.NonFiniteGuard(max_skips=3)
    trainer = toy_trainer(grad_scaler=Scaler())
    trainer.register_hooks([guard])
    trainer.train(0, 2)
    assert guard.num_skipped == 2
