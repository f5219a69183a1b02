"""Pausing at a signal and at a deadline; what is saved, and that resuming goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import Checkpointer
from dinoengine.engine import SimpleTrainer, TrainerBase, hooks
from tests.engine.toys import toy_trainer


def _send(number: int, at: int) -> hooks.CallbackHook:
    def send(trainer: TrainerBase) -> None:
        if trainer.iter == at:
            os.kill(os.getpid(), number)

    return hooks.CallbackHook(before_step=send)


def _trainer(
    folder: Path, *more: Any, evaluate: Callable[[], Any] = lambda: {"task": {"score": 1.0}}, period: int = 3
) -> SimpleTrainer:
    trainer = toy_trainer()
    saving = hooks.PeriodicCheckpointer(Checkpointer(trainer.model, str(folder), trainer=trainer), 0)
    trainer.register_hooks([*more, saving, hooks.EvalHook(period, evaluate), hooks.StopOnSignal(saving)])
    return trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_iteration_it_came_in_and_pauses(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    trainer = _trainer(tmp_path, _send(number, at=3))
    trainer.train(0, 10)
    assert (trainer.iter, trainer.paused, trainer.succeeded) == (4, True, False)
    assert signal.Signals(number).name in trainer.pause_reason
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert torch.load(tmp_path / "model_0000003.pth")["iteration"] == 3
    assert signal.getsignal(number) is before


def test_an_evaluation_that_was_due_is_done_by_the_resumed_run(tmp_path: Path) -> None:
    evaluated_at: list[int] = []
    paused = _trainer(tmp_path, _send(signal.SIGTERM, at=2), evaluate=lambda: evaluated_at.append(2) or {})  # type: ignore[func-returns-value]
    paused.train(0, 5)
    assert evaluated_at == []

    resumed = _trainer(tmp_path, evaluate=lambda: {"score": 7.0})
    start = Checkpointer(resumed.model, str(tmp_path), trainer=resumed).resume_or_load("")
    resumed.train(start, 5)
    assert start == 3
    assert resumed.storage.history("score").values() == [(7.0, 2), (7.0, 5)]


def test_a_signal_in_an_evaluation_leaves_it_at_once(tmp_path: Path) -> None:
    def evaluate() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    trainer = _trainer(tmp_path, evaluate=evaluate)
    trainer.train(0, 10)
    assert trainer.iter == 3
    assert "evaluation will be done when the run is resumed" in trainer.pause_reason
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_a_signal_in_the_final_evaluation_leaves_a_finished_run_without_results(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, evaluate=lambda: os.kill(os.getpid(), signal.SIGTERM), period=0)
    trainer.train(0, 2)
    assert (trainer.succeeded, trainer.paused) == (True, False)
    assert trainer.pause_reason
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_signal_that_comes_after_the_check_of_a_step_counts_in_the_next(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path, hooks.CallbackHook(after_step=lambda t: t.iter == 1 and os.kill(os.getpid(), signal.SIGTERM))
    )
    trainer.train(0, 10)
    assert trainer.iter == 3


def test_an_error_after_the_signal_is_no_pause(tmp_path: Path) -> None:
    class Broken(hooks.CallbackHook):
        def after_step(self) -> None:
            if self.trainer.pause_reason:
                raise RuntimeError("broken")

    trainer = _trainer(tmp_path, _send(signal.SIGTERM, at=1))
    trainer.register_hooks([Broken()])
    trainer._hooks.append(trainer._hooks.pop(-2))  # behind the hook that asks for the pause
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train(0, 10)
    assert not trainer.paused
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("11h50m", 42600), ("90m", 5400), ("45s", 45), ("1d2h", 93600), ("0.5h", 1800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert hooks.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "11", "h", "11h 50m", "1x", "-5m", "1h50"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected numbers with units d, h, m, s"):
        hooks.parse_duration(text)


def test_a_run_ends_before_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("dinoengine.engine.hooks.stopping.time.monotonic", lambda: clock[0])

    def work(trainer: TrainerBase) -> None:
        clock[0] += 10.0

    trainer = _trainer(tmp_path, hooks.CallbackHook(after_step=work), hooks.TimeBudget(1100.0))
    trainer.train(0, 100)
    # Iteration 8 starts at 1080, and a ninth would end at 1100 with nothing left to save in.
    assert trainer.iter == 9
    assert trainer.pause_reason == "the time budget is used up."
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000008.pth"
