"""Timer, schedules, EMA, writer, profiler, callbacks."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from dinoengine.engine import hooks
from dinoengine.solver import CosineSchedule, LinearWarmupSchedule, OptimizerSchedule
from dinoengine.utils.startup import StartupTimes
from dinoengine.utils.writers import ConsoleWriter, EventWriter, JSONWriter
from tests.engine.toys import IdleTrainer, ToyData, toy_trainer


def test_timer_leaves_the_first_iterations_out_and_agrees_with_its_summary(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dinoengine")
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.IterationTimer(warmup_iters=3)])
    trainer.train(10, 60)
    assert len(trainer.storage.history("time").values()) == 48
    assert "Overall training speed: 48 iterations in 0:00:00" in caplog.text
    assert "Total training time:" in caplog.text


def test_lr_scheduler_sets_and_logs_the_value_used_in_the_step() -> None:
    trainer = toy_trainer()
    lr = CosineSchedule(1.0, 0.1, 4)
    schedule = OptimizerSchedule(trainer.optimizer, lr=lr, weight_decay=lambda i: 0.5, last_layer_lr=lr)
    used: list[float] = []
    trainer.register_hooks(
        [
            hooks.LRScheduler(schedule),
            hooks.CallbackHook(after_backward=lambda t: used.append(t.optimizer.param_groups[0]["lr"])),
        ]
    )
    trainer.train(0, 4)
    assert used == [lr(i) for i in range(4)]
    assert [v for v, _ in trainer.storage.history("lr").values()] == used
    assert set(trainer.storage.names("schedule")) == {"lr", "last_layer_lr", "weight_decay"}


def test_param_schedule_sets_before_the_step() -> None:
    trainer = IdleTrainer()
    schedule = LinearWarmupSchedule(0.04, 0.07, 3)
    values: list[float] = []
    trainer.register_hooks([hooks.ParamSchedule("teacher_temp", schedule, values.append)])
    trainer.train(1, 4)
    assert values == [schedule(i) for i in (1, 2, 3)]
    assert trainer.storage.latest()["teacher_temp"] == (0.07, 3)


class _Teacher:
    def __init__(self) -> None:
        self.momenta: list[float] = []

    def update_teacher(self, momentum: float) -> None:
        self.momenta.append(momentum)


def test_the_teacher_follows_after_every_step_that_changed_weights() -> None:
    teacher = _Teacher()
    trainer = toy_trainer(ToyData(bad_iters=(1,)))
    trainer.register_hooks([hooks.NonFiniteGuard(1), hooks.EMATeacher(teacher, lambda i: 0.9 + i / 100)])
    trainer.train(0, 3)
    assert teacher.momenta == [0.9, 0.92]
    assert [i for _, i in trainer.storage.history("teacher_momentum").values()] == [0, 1, 2]


class _CountingWriter(EventWriter):
    def __init__(self) -> None:
        self.at: list[int] = []
        self.closed = 0
        self.trainer: IdleTrainer | None = None

    def write(self) -> None:
        assert self.trainer is not None
        self.at.append(self.trainer.iter)

    def close(self) -> None:
        self.closed += 1


def test_writers_write_each_period_at_the_end_and_after_training() -> None:
    writer = _CountingWriter()
    trainer = writer.trainer = IdleTrainer()
    trainer.register_hooks([hooks.PeriodicWriter([writer], period=4)])
    trainer.train(0, 10)
    assert writer.at == [3, 7, 9, 10]
    assert writer.closed == 1


def test_writers_from_a_function_are_made_when_training_starts(tmp_path: Path) -> None:
    made: list[int] = []
    trainer = IdleTrainer()

    def make() -> list[EventWriter]:
        made.append(trainer.start_iter)
        return [JSONWriter(str(tmp_path / "metrics.json"), trainer.start_iter)]

    trainer.register_hooks(
        [
            hooks.PeriodicWriter(make, period=2),
            hooks.EvalHook(0, lambda: {"knn": {"top1": 50.0}}),
            hooks.CallbackHook(after_step=lambda t: t.storage.put_scalar("x", t.iter)),
        ]
    )
    trainer.train(3, 6)
    assert made == [3]
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert rows == [
        *({"iteration": i, "x": i} for i in (3, 4, 5)),
        {"iteration": 6, "knn/top1": 50.0},
    ]


def test_the_start_is_reported_once_with_the_wait_for_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dinoengine")
    times = StartupTimes()
    times.put_first({"imports": 3.0})
    trainer = toy_trainer(SlowStart(0.2))
    slow = hooks.CallbackHook(before_train=lambda _: time.sleep(0.3), after_step=lambda _: time.sleep(0.1))
    trainer.register_hooks([hooks.StartupReport(times), slow])
    trainer.train(0, 3)
    assert list(times.seconds) == ["imports", "hooks", "batch", "step"]
    assert times.seconds["hooks"] >= 0.3
    assert times.seconds["batch"] >= 0.2
    assert [r.getMessage() for r in caplog.records if "First iteration" in r.msg] == [
        f"First iteration after {times.line()}."
    ]


class SlowStart(ToyData):
    """The first batch takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def __iter__(self) -> Iterator[Tensor]:
        time.sleep(self.seconds)
        return super().__iter__()


def test_the_profiler_records_the_iterations_it_was_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dinoengine")
    trainer = toy_trainer()
    trainer.register_hooks([hooks.TorchProfiler(1, 3, str(tmp_path))])
    trainer.train(0, 5)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "iter1-2.trace.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("addmm" in event.get("name", "") for event in events)
    assert "Profiler trace in" in caplog.text


def test_a_profile_that_reaches_beyond_the_run_is_still_written(tmp_path: Path) -> None:
    trainer = toy_trainer()
    trainer.register_hooks([hooks.TorchProfiler(1, 30, str(tmp_path))])
    trainer.train(0, 3)
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_callbacks_get_the_trainer_at_every_point() -> None:
    points = ["before_train", "after_train", "before_step", "after_backward", "before_optimizer_step", "after_step"]
    called: list[str] = []
    trainer = toy_trainer()
    callbacks = {p: (lambda t, p=p: called.append(f"{p}@{t.iter}")) for p in points}
    trainer.register_hooks([hooks.CallbackHook(**callbacks), hooks.CallbackHook()])
    trainer.train(0, 1)
    assert called == [
        "before_train@0",
        "before_step@0",
        "after_backward@0",
        "before_optimizer_step@0",
        "after_step@0",
        "after_train@1",
    ]


def test_a_run_that_fails_in_its_first_iteration_leaves_no_metrics(tmp_path: Path) -> None:
    for fail_at, rows in ((0, 0), (2, 3)):
        trainer = IdleTrainer(fail_at=fail_at)
        path = tmp_path / f"{fail_at}.json"
        lr = hooks.CallbackHook(before_step=lambda t: t.storage.put_scalar("lr", 0.1))
        trainer.register_hooks([lr, hooks.PeriodicWriter([JSONWriter(str(path), 0)], period=1)])
        with pytest.raises(RuntimeError, match="step failed"):
            trainer.train(0, 5)
        assert len(path.read_text().splitlines() if path.exists() else []) == rows


class _SometimesFull(EventWriter):
    def __init__(self, full: set[int]) -> None:
        self.full = full
        self.num_calls = 0

    def write(self) -> None:
        self.num_calls += 1
        if self.num_calls in self.full:
            raise OSError(28, "No space left on device")


def test_a_writer_that_cannot_write_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    writer, other = _SometimesFull({2, 3}), _SometimesFull(set())
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.PeriodicWriter([writer, other], period=1)])
    with caplog.at_level("INFO"):
        trainer.train(0, 5)
    assert (writer.num_calls, other.num_calls) == (6, 6)
    assert caplog.text.count("cannot write, and will try again: [Errno 28] No space left on device") == 1
    assert "writes again, after 2 attempts that failed" in caplog.text
    assert "is missing" not in caplog.text


def test_what_could_not_be_written_in_the_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.PeriodicWriter([_SometimesFull({4, 5, 6})], period=1)])
    trainer.train(0, 5)
    assert "_SometimesFull: the last 3 attempts to write failed, so its end is missing." in caplog.text


def test_a_clock_that_jumps_back_changes_no_duration(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = itertools.count(10**9, -86400)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    trainer = toy_trainer()
    lines: list[str] = []
    console = ConsoleWriter(8, images_per_iter=8)
    trainer.register_hooks(
        [
            hooks.IterationTimer(warmup_iters=1),
            hooks.CallbackHook(after_step=lambda t: lines.append(console.line(t.storage))),
        ]
    )
    with caplog.at_level("INFO"):
        trainer.train(0, 8)
    seconds = [v for name in ("time", "data_time") for v, _ in trainer.storage.history(name).values()]
    assert all(0 <= s < 60 for s in seconds)
    assert len(seconds) == 16
    assert "eta 0:00:0" in lines[-1]
    assert "Total training time: 0:00:" in caplog.text
