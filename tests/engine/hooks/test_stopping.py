"""Pausing at a signal and at a deadline; what is saved, and that resuming goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import Checkpointer
from dinoengine.config import CfgNode
from dinoengine.engine import SimpleTrainer, SSLTrainer, TrainerBase, hooks
from dinoengine.engine.verify import compare_checkpoints
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
    assert (trainer.succeeded, trainer.paused) == (False, False)
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


_GRID = {
    "SOLVER.MAX_ITER": 13,
    "SOLVER.CHECKPOINT_PERIOD": 5,
    "TEST.EVAL_PERIOD": 6,
    "LOG.PERIOD": 4,
    "TEST.BEST_METRIC": "knn/top1_k1",
    "TEST.EARLY_STOPPING_PATIENCE": 9,
    "SEED": 3,
}


def _run(cfg: CfgNode, out: Path, *more: Any, resume: bool = False) -> SSLTrainer:
    cfg = cfg.clone()
    cfg.merge_from_list(["OUTPUT_DIR", str(out)])
    trainer = SSLTrainer(cfg)
    trainer.register_hooks(more)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def _rows(out: Path) -> list[dict[str, Any]]:
    """metrics.json without what clocks say."""
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "time" not in key} for row in rows]


def test_a_pause_at_any_iteration_leaves_no_trace(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """In weights, optimizer, hooks, metric history, best checkpoint and metrics.json; on and off each of the periods."""
    tiny_cfg.merge_from_list([word for pair in _GRID.items() for word in pair])
    _run(tiny_cfg, tmp_path / "whole")
    for at in range(12):
        out = tmp_path / f"paused_at_{at}"
        tiny_cfg.SOLVER.CHECKPOINT_IN_BACKGROUND = bool(at % 2)
        paused = _run(tiny_cfg, out, _send(signal.SIGTERM, at=at))
        assert (paused.iter, paused.paused) == (at + 1, True)
        resumed = _run(tiny_cfg, out, resume=True)
        assert resumed.start_iter == at + 1
        for name, parts in (("model_final", ("model", "trainer", "iteration")), ("model_best", ("model", "iteration"))):
            found = compare_checkpoints(*(str(tmp_path / run / f"{name}.pth") for run in ("whole", out.name)), parts)
            assert found.different == [], (at, name)
        assert _rows(out) == _rows(tmp_path / "whole"), at


def test_a_checkpoint_that_could_not_be_written_is_no_saved_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer()
    checkpointer = Checkpointer(trainer.model, str(tmp_path), on_error="continue", trainer=trainer)
    saving = hooks.PeriodicCheckpointer(checkpointer, 2)
    trainer.register_hooks([_send(signal.SIGTERM, at=1), saving, hooks.StopOnSignal(saving)])
    save, failures = torch.save, [OSError(28, "No space left on device")]

    def fail_once(*args: Any) -> None:
        if failures:
            raise failures.pop()
        save(*args)

    monkeypatch.setattr(torch, "save", fail_once)
    trainer.train(0, 10)
    assert failures == []
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
