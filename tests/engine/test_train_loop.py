"""Iterations and hooks: order, errors, state."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dinoengine.engine import HookBase, hooks
from dinoengine.utils.events import get_event_storage, has_event_storage
from tests.engine.toys import Counter, IdleTrainer, Recorder, toy_trainer


def test_hooks_run_in_order_around_each_step() -> None:
    calls: list[str] = []
    trainer = IdleTrainer()
    trainer.register_hooks([Recorder(calls, "a"), None, Recorder(calls, "b")])
    trainer.train(3, 5)
    assert calls == [
        "a.before_train@3",
        "b.before_train@3",
        *[f"{h}.{point}@{i}" for i in (3, 4) for point in ("before_step", "after_step") for h in "ab"],
        "a.after_train@5",
        "b.after_train@5",
    ]


def test_the_callbacks_inside_a_step_come_between() -> None:
    calls: list[str] = []
    trainer = toy_trainer()
    trainer.register_hooks([Recorder(calls)])
    trainer.train(0, 1)
    points = ["before_train", "before_step", "after_backward", "before_optimizer_step", "after_step"]
    assert calls == [*[f"a.{p}@0" for p in points], "a.after_train@1"]


def test_writers_stay_last_whatever_comes_later() -> None:
    trainer = IdleTrainer()
    writer, early, late = hooks.PeriodicWriter([]), HookBase(), HookBase()
    trainer.register_hooks([early, writer])
    trainer.register_hooks([late])
    assert trainer._hooks == [early, late, writer]


def test_iteration_and_storage_agree_and_end_at_max_iter() -> None:
    trainer = IdleTrainer()
    seen = []
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: seen.append((t.iter, get_event_storage().iter)))])
    trainer.train(2, 4)
    assert seen == [(2, 2), (3, 3)]
    assert (trainer.iter, trainer.storage.iter, trainer.succeeded) == (4, 4, True)
    assert not has_event_storage()


def test_an_error_ends_the_run_at_its_iteration_and_after_train_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    trainer = IdleTrainer(fail_at=1)
    trainer.register_hooks([Recorder(calls)])
    with (
        caplog.at_level(logging.DEBUG, logger="dinoengine"),
        pytest.raises(RuntimeError, match="step failed"),
    ):
        trainer.train(0, 3)
    assert calls[-1] == "a.after_train@1"
    assert (trainer.iter, trainer.succeeded) == (1, False)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert said == "Training stopped by an error in iteration 1 (RuntimeError)."
    assert "The error: step failed" in caplog.text  # for log.txt; the console gets it from whoever ends the process
    assert not has_event_storage()


def test_an_error_in_the_last_step_is_no_success() -> None:
    trainer = IdleTrainer(fail_at=2)
    evaluated = []
    trainer.register_hooks([hooks.EvalHook(0, lambda: evaluated.append(1) or {})])  # type: ignore[func-returns-value]
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(0, 3)
    assert evaluated == []


def test_keyboard_interrupt_passes_through_after_train() -> None:
    calls: list[str] = []
    trainer = IdleTrainer(fail_at=0, error=KeyboardInterrupt())
    trainer.register_hooks([Recorder(calls)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0, 1)
    assert calls[-1] == "a.after_train@0"


class _FailsAtEnd(HookBase):
    def __init__(self, message: str) -> None:
        self.message = message

    def after_train(self) -> None:
        raise ValueError(self.message)


def test_a_hook_that_fails_at_the_end_stops_no_other_and_the_first_is_reported() -> None:
    calls: list[str] = []
    trainer = IdleTrainer()
    trainer.register_hooks([_FailsAtEnd("first"), _FailsAtEnd("second"), Recorder(calls)])
    with pytest.raises(ValueError, match="first"):
        trainer.train(0, 1)
    assert calls[-1] == "a.after_train@1"


def test_the_error_of_the_step_is_reported_rather_than_that_of_a_hook() -> None:
    trainer = IdleTrainer(fail_at=0)
    trainer.register_hooks([_FailsAtEnd("later")])
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(0, 1)


class _FailsAtStart(HookBase):
    def before_train(self) -> None:
        raise OSError("no disk")


def test_an_error_before_the_first_step_runs_after_train_too() -> None:
    calls: list[str] = []
    trainer = IdleTrainer()
    trainer.register_hooks([_FailsAtStart(), Recorder(calls)])
    with pytest.raises(OSError, match="no disk"):
        trainer.train(0, 1)
    assert calls == ["a.after_train@0"]


@pytest.mark.parametrize("start", [5, 7])
def test_a_finished_run_does_nothing(start: int) -> None:
    calls: list[str] = []
    trainer = IdleTrainer(fail_at=5)
    trainer.register_hooks([Recorder(calls)])
    trainer.train(start, 5)
    assert calls == []
    assert trainer.iter == start


def test_two_stateful_hooks_of_one_class_keep_their_states_apart() -> None:
    trainer = IdleTrainer()
    trainer.register_hooks([Counter("x"), Counter("y")])
    trainer.train(0, 3)
    state = trainer.state_dict()
    state["hooks"]["y"]["count"] = 11
    other = IdleTrainer()
    x, y = Counter("x"), Counter("y")
    other.register_hooks([x, y])
    other.load_state_dict(state)
    assert (x.count, y.count) == (3, 11)


def test_two_stateful_hooks_of_one_name_are_refused() -> None:
    trainer = IdleTrainer()
    with pytest.raises(ValueError, match="Two hooks with state are named 'x'"):
        trainer.register_hooks([Counter("x"), Counter("x")])
    trainer.register_hooks([HookBase(), HookBase()])  # without state there is nothing to confuse


def test_missing_state_is_an_error_and_foreign_state_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    saved = IdleTrainer()
    saved.register_hooks([Counter("x")])
    saved.train(0, 1)
    trainer = IdleTrainer()
    trainer.register_hooks([Counter("x"), Counter("y")])
    with pytest.raises(ValueError, match="no state for hook 'y'"):
        trainer.load_state_dict(saved.state_dict())
    with caplog.at_level(logging.WARNING, logger="dinoengine"):
        IdleTrainer().load_state_dict(saved.state_dict())
    assert "state of hooks this run does not have: x" in caplog.text


def test_a_hook_that_does_not_need_its_state_begins_anew_without_it_and_takes_it_where_there_is_one() -> None:
    class Optional(Counter):
        needs_state = False

    saved, trainer = IdleTrainer(), IdleTrainer()
    hook = Optional("x")
    trainer.register_hooks([hook])
    trainer.load_state_dict(saved.state_dict())
    assert hook.count == 0
    saved.register_hooks([Counter("x")])
    saved.train(0, 2)
    trainer.load_state_dict(saved.state_dict())
    assert hook.count == 2


class _SavesOnly(HookBase):
    def state_dict(self) -> dict[str, int]:
        return {"a": 1}


def test_a_hook_that_saves_but_cannot_load_says_so() -> None:
    trainer = IdleTrainer()
    trainer.register_hooks([_SavesOnly()])
    with pytest.raises(NotImplementedError, match="_SavesOnly saves state but has no load_state_dict"):
        trainer.load_state_dict(trainer.state_dict())


def test_a_hook_does_not_keep_its_trainer_alive() -> None:
    hook = HookBase()
    trainer = IdleTrainer()
    trainer.register_hooks([hook])
    del trainer
    with pytest.raises(ReferenceError):
        _ = hook.trainer.iter


def test_a_trainer_can_train_twice() -> None:
    trainer = IdleTrainer()
    counter = Counter("x")
    trainer.register_hooks([counter, hooks.CallbackHook(after_train=lambda t: None)])
    trainer.train(0, 2)
    trainer.train(2, 5)
    assert counter.count == 5


def test_a_hook_may_ask_to_stop_after_the_iteration() -> None:
    calls: list[str] = []

    def ask(t: Any) -> None:
        if t.iter == 4:
            t.request_stop("enough")

    trainer = IdleTrainer()
    trainer.register_hooks([hooks.CallbackHook(after_step=ask), Recorder(calls)])
    trainer.train(2, 10)
    assert calls[-3:] == ["a.before_step@4", "a.after_step@4", "a.after_train@5"]  # hooks behind it have their turn
    assert trainer.succeeded
    assert (trainer.stop_reason, trainer.storage.iter) == ("enough", 5)
    calls.clear()
    trainer.train(5, 7)  # asked once is stopped once
    assert calls[-1] == "a.after_train@7"


class _Failing(HookBase):
    """Raises at one point, every time."""

    def __init__(self, point: str, text: str) -> None:
        self._text = text
        setattr(self, point, self._fail)

    def _fail(self) -> None:
        raise ValueError(self._text)


@pytest.mark.parametrize("point", ["before_train", "before_step", "after_step", "after_train"])
def test_of_several_hooks_that_fail_the_first_error_is_reported_and_all_come_to_their_end(
    point: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    trainer = IdleTrainer()
    trainer.register_hooks(
        [
            Recorder(calls, "a"),
            _Failing(point, "first"),
            _Failing("after_train", "second"),
            Recorder(calls, "b"),
            _Failing(point, "third"),
            _Failing("after_train", "fourth"),
        ]
    )
    with pytest.raises(ValueError, match="first"):
        trainer.train(0, 3)
    assert [call for call in calls if "after_train" in call] == [
        f"{label}.after_train@{3 if point == 'after_train' else 0}" for label in "ab"
    ]
    assert trainer.succeeded == (point == "after_train")
    for text in ("second", "fourth"):  # what else went wrong is in the log
        assert f"ValueError: {text}" in caplog.text
