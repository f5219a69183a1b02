"""When checkpoints are written, kept, and called best."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import Checkpointer, CheckpointWriteError
from dinoengine.config import ConfigError
from dinoengine.engine import hooks
from tests.engine.toys import IdleTrainer, ToyModel


def _files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".pth"))


def _run(folder: Path, start: int, stop: int, **options: Any) -> None:
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.PeriodicCheckpointer(Checkpointer(ToyModel(), str(folder)), **options)])
    trainer.train(start, stop)


def test_names_count_from_0_and_the_end_is_final(tmp_path: Path) -> None:
    _run(tmp_path, 0, 25, period=10)
    assert _files(tmp_path) == ["model_0000009.pth", "model_0000019.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_0000019.pth")["iteration"] == 19
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 24


def test_both_are_written_when_they_coincide(tmp_path: Path) -> None:
    _run(tmp_path, 0, 10, period=5)
    assert _files(tmp_path) == ["model_0000004.pth", "model_0000009.pth", "model_final.pth"]


def test_period_0_saves_only_at_the_end(tmp_path: Path) -> None:
    _run(tmp_path, 0, 10, period=0)
    assert _files(tmp_path) == ["model_final.pth"]


def test_max_to_keep_holds_across_a_resume(tmp_path: Path) -> None:
    _run(tmp_path, 0, 6, period=2, max_to_keep=2)
    assert _files(tmp_path) == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    _run(tmp_path, 6, 10, period=2, max_to_keep=2)
    assert _files(tmp_path) == ["model_0000007.pth", "model_0000009.pth", "model_final.pth"]


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_saved_from_there(tmp_path: Path) -> None:
    _run(tmp_path, 0, 10, period=2, max_to_keep=2)
    _run(tmp_path, 2, 4, period=2, max_to_keep=2)  # iterations 7 and 9 are there from before
    assert _files(tmp_path) == ["model_0000003.pth", "model_0000009.pth", "model_final.pth"]
    _run(tmp_path, 4, 6, period=2, max_to_keep=2)
    assert _files(tmp_path) == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]


@pytest.mark.parametrize("background", [False, True])
def test_keep_every_holds_across_a_resume(tmp_path: Path, background: bool) -> None:
    options = {"period": 2, "max_to_keep": 1, "keep_every": 4, "background": background}
    _run(tmp_path, 0, 6, **options)
    assert _files(tmp_path) == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    _run(tmp_path, 6, 10, **options)
    assert _files(tmp_path) == ["model_0000003.pth", "model_0000007.pth", "model_0000009.pth", "model_final.pth"]


@pytest.mark.parametrize(("check_period", "expected"), [(1, [2, 5, 8, 11, 12]), (5, [4, 9, 12])])
def test_saves_by_the_clock(tmp_path: Path, check_period: int, expected: list[int]) -> None:
    """One minute an iteration, a save every three minutes and after 13 iterations; at the end model_final alone."""
    now = [1000.0]
    trainer = IdleTrainer()
    checkpointer = Checkpointer(ToyModel(), str(tmp_path))
    hook = hooks.PeriodicCheckpointer(checkpointer, 13, minutes=3, check_period=check_period, clock=lambda: now[0])

    def work(_: Any) -> None:
        now[0] += 60

    trainer.register_hooks([hooks.CallbackHook(before_step=work), hook])
    trainer.train(0, 15)
    assert _files(tmp_path) == [*(f"model_{iteration:07d}.pth" for iteration in expected), "model_final.pth"]


class _Disk:
    """Lets the writing of some files fail, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *full_at: int) -> None:
        save = torch.save

        def write(data: Any, file: Any) -> None:
            if data["iteration"] in full_at:
                file.write(b"some of it")
                raise OSError(28, "No space left on device")
            save(data, file)

        monkeypatch.setattr(torch, "save", write)


def _run_on_full_disk(folder: Path, stop: int, on_error: str, background: bool) -> Checkpointer:
    trainer = IdleTrainer()
    checkpointer = Checkpointer(ToyModel(), str(folder), on_error=on_error)
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 2, max_to_keep=1, background=background)])
    trainer.train(0, stop)
    return checkpointer


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_stops_the_run_with_the_last_good_one_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    _Disk(monkeypatch, 3)
    words = r"model_0000003\.pth could not be written: No space left on device\. It needs .* the last good checkpoint is mod"
    with pytest.raises(CheckpointWriteError, match=words + r"el_0000001\.pth"):
        _run_on_full_disk(tmp_path, 10, "stop", background)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert Checkpointer(ToyModel(), str(tmp_path)).resume_or_load("", resume=True) == 2


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_that_the_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _Disk(monkeypatch, 3, 5)
    with monkeypatch.context() as patch:
        patch.setattr(hooks.PeriodicCheckpointer, "_save_final", lambda self: self.checkpointer.wait())
        assert _run_on_full_disk(tmp_path, 6, "continue", background).num_failed == 2
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]  # nothing is deleted for nothing
    assert _run_on_full_disk(tmp_path, 10, "continue", background).num_failed == 2
    assert _files(tmp_path) == ["model_0000009.pth", "model_final.pth"]
    assert "Going on without it, as SOLVER.CHECKPOINT_ON_ERROR is continue (2 so far)" in caplog.text
    assert "2 checkpoint(s) of this run could not be written" in caplog.text


@pytest.mark.parametrize("background", [False, True])
def test_the_final_one_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    _Disk(monkeypatch, 4)
    with pytest.raises(CheckpointWriteError, match=r"model_final\.pth could not be written"):
        _run_on_full_disk(tmp_path, 5, "continue", background)
    assert _files(tmp_path) == ["model_0000003.pth"]
    with pytest.raises(ValueError, match="on_error must be one of stop, continue; got 'panic'"):
        Checkpointer(ToyModel(), str(tmp_path), on_error="panic")


def test_a_run_that_fails_still_finishes_the_file_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def slow(data: Any, file: Any) -> None:
        time.sleep(0.2)
        save(data, file)

    monkeypatch.setattr(torch, "save", slow)
    trainer = IdleTrainer(fail_at=2)
    checkpointer = Checkpointer(ToyModel(), str(tmp_path))
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 2, background=True)])
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(0, 10)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_background_and_best_and_training_that_goes_on(tmp_path: Path) -> None:
    """Every file holds the weights of its iteration, though they changed while it was written."""
    trainer = IdleTrainer()
    model = ToyModel()
    checkpointer = Checkpointer(model, str(tmp_path))

    def step(t: Any) -> None:
        torch.nn.init.constant_(model.linear.weight, float(t.iter))
        t.storage.put_scalar("m", -abs(t.iter - 5), smoothing_hint=False, role="eval")

    trainer.register_hooks(
        [
            hooks.CallbackHook(before_step=step),
            hooks.PeriodicCheckpointer(checkpointer, 1, background=True),
            hooks.BestCheckpointer(checkpointer, "m"),
        ]
    )
    trainer.train(0, 9)
    for name in _files(tmp_path):
        saved = torch.load(tmp_path / name)
        expected = {"model_best.pth": 5, "model_final.pth": 8}.get(name, saved["iteration"])
        assert saved["iteration"] == expected
        assert saved["model"]["linear.weight"].tolist() == [[float(expected)] * 4]
    assert len(_files(tmp_path)) == 11
    assert json.loads((tmp_path / "model_best.json").read_text())["iteration"] == 5


def test_nothing_final_after_an_error(tmp_path: Path) -> None:
    trainer = IdleTrainer(fail_at=3)
    trainer.register_hooks([hooks.PeriodicCheckpointer(Checkpointer(ToyModel(), str(tmp_path)), 2)])
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(0, 10)
    assert _files(tmp_path) == ["model_0000001.pth"]


def _best(folder: Path, values: list[float], start: int = 0, **options: Any) -> list[int]:
    """Iterations at which a new best was written, for one value per iteration."""
    trainer = IdleTrainer()
    checkpointer = Checkpointer(ToyModel(), str(folder))
    saved: list[int] = []
    original = checkpointer.save
    checkpointer.save = lambda name, **kw: (saved.append(kw["iteration"]), original(name, **kw))[1]  # type: ignore[method-assign]

    def put(t: Any) -> None:
        t.storage.put_scalar("knn/top1", values[t.iter - start], smoothing_hint=False, role="eval")

    trainer.register_hooks(
        [hooks.CallbackHook(after_step=put), hooks.BestCheckpointer(checkpointer, "knn/top1", **options)]
    )
    trainer.train(start, start + len(values))
    return saved


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        ([1, 3, 2, 3, 4], "max", [0, 1, 4]),
        ([3, 1, 2, 1, 0], "min", [0, 1, 4]),
        ([math.nan, math.inf, 2, math.nan, 3], "max", [2, 4]),
        ([math.inf, -math.inf, 2, 1], "min", [2, 3]),
    ],
)
def test_only_what_is_better_than_ever_is_best(
    tmp_path: Path, values: list[float], mode: str, expected: list[int]
) -> None:
    assert _best(tmp_path, values, mode=mode) == expected


def test_the_best_value_survives_a_resume_and_does_not_move_the_pointer(tmp_path: Path) -> None:
    Checkpointer(ToyModel(), str(tmp_path)).save("model_0000099", iteration=99)
    assert _best(tmp_path, [5, 6]) == [0, 1]
    assert _best(tmp_path, [5.5, 6, 7], start=2) == [4]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000099.pth"
    assert json.loads((tmp_path / "model_best.json").read_text()) == {
        "metric": "knn/top1",
        "mode": "max",
        "value": 7,
        "iteration": 4,
    }
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 4


def test_one_evaluation_is_judged_once(tmp_path: Path) -> None:
    trainer = IdleTrainer()
    checkpointer = Checkpointer(ToyModel(), str(tmp_path))
    hook = hooks.BestCheckpointer(checkpointer, "m")
    put_once = hooks.CallbackHook(after_step=lambda t: t.storage.put_scalar("m", 1.0) if t.iter == 0 else None)
    trainer.register_hooks([put_once, hook])
    trainer.train(0, 3)
    assert hook.best() == (1.0, 0)
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 0


def test_a_restored_value_is_no_new_measurement(tmp_path: Path) -> None:
    """After a resume the weights are not those that an old value was measured on."""
    trainer = IdleTrainer()
    trainer.storage.iter = 4
    trainer.storage.put_scalar("m", 9.0)
    hook = hooks.BestCheckpointer(Checkpointer(ToyModel(), str(tmp_path)), "m")
    trainer.register_hooks([hook])
    trainer.train(5, 7)
    assert hook.best() is None
    assert _files(tmp_path) == []


def test_the_record_of_another_metric_does_not_compete(tmp_path: Path) -> None:
    for damaged in ("", "[]", '{"metric": "m"}', '{"metric": "m", "value": "x", "iteration": 3}'):
        (tmp_path / "model_best.json").write_text(damaged)
        assert hooks.BestCheckpointer(Checkpointer(ToyModel(), str(tmp_path)), "m").best() is None
    (tmp_path / "model_best.json").write_text(json.dumps({"metric": "loss", "value": 99.0, "iteration": 3}))
    assert _best(tmp_path, [5.0]) == [0]


def test_the_best_in_the_other_mode_does_not_compete(tmp_path: Path) -> None:
    assert _best(tmp_path, [5.0, 4.0]) == [0]
    assert _best(tmp_path, [7.0, 6.0], start=2, mode="min") == [2, 3]


def test_a_metric_that_no_evaluator_reports_stops_the_run_with_those_there_are(tmp_path: Path) -> None:
    trainer = IdleTrainer()
    trainer.register_hooks(
        [
            hooks.EvalHook(2, lambda: {"knn": {"top1_k10": 1.0, "top1_k20": 2.0}}),
            hooks.BestCheckpointer(Checkpointer(ToyModel(), str(tmp_path)), "knn/top1_k5"),
        ]
    )
    message = r"TEST.BEST_METRIC: 'knn/top1_k5' is not measured. There are: knn/top1_k10, knn/top1_k20\."
    with pytest.raises(ConfigError, match=message):
        trainer.train(0, 10)
    assert trainer.iter == 1  # at the first evaluation


def _early(
    folder: Path, values: dict[int, float], *, start: int = 0, patience: int = 2, stop: int = 20, mode: str = "max"
) -> IdleTrainer:
    """A run that is evaluated every two iterations; ``values`` by iteration."""
    trainer = IdleTrainer()
    checkpointer = Checkpointer(ToyModel(), str(folder), trainer=trainer)
    best = hooks.BestCheckpointer(checkpointer, "m/x", mode)
    trainer.register_hooks(
        [
            hooks.PeriodicCheckpointer(checkpointer, 3),
            hooks.EvalHook(2, lambda: {"m": {"x": values.get(trainer.iter, 0.0)}}, eval_at_start=-1 in values),
            best,
            hooks.EarlyStopping(best, 2, patience),
        ]
    )
    assert checkpointer.resume_or_load("") == start
    trainer.train(start, stop)
    return trainer


@pytest.mark.parametrize(
    ("values", "patience", "num_done"),
    [
        ({1: 1.0, 3: 2.0, 5: 1.5, 7: 1.9}, 2, 8),
        ({1: 1.0, 3: 2.0, 5: 2.0, 7: 2.0}, 2, 8),  # no better is not better
        ({1: 1.0, 3: 0.5, 5: 1.5, 7: 0.0, 9: 0.0}, 2, 10),  # one better evaluation starts the count anew
        ({1: 5.0}, 1, 4),
        ({1: 5.0}, 100, 20),
        (dict.fromkeys(range(20), math.nan), 3, 6),
    ],
)
def test_a_run_ends_when_nothing_got_better(
    tmp_path: Path, values: dict[int, float], patience: int, num_done: int
) -> None:
    trainer = _early(tmp_path, values, patience=patience)
    assert trainer.succeeded
    assert trainer.iter == num_done
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == num_done - 1
    # Each evaluation once: a run that was stopped is not evaluated again with the same weights.
    assert [i for _, i in trainer.storage.history("m/x").values()] == [
        *range(1, min(num_done, 19), 2),
        *([20] if num_done == 20 else []),
    ]


def test_lower_is_better_where_it_is_said(tmp_path: Path) -> None:
    assert _early(tmp_path, {1: 3.0, 3: 2.0, 5: 1.0, 7: 1.5, 9: 1.2}, mode="min").iter == 10


def test_the_evaluation_before_the_first_iteration_does_not_count(tmp_path: Path) -> None:
    """Its weights are no checkpoint of this run."""
    assert _early(tmp_path, {-1: 0.0, 0: 9.0, 1: 5.0, 3: 5.0}).iter == 6


def test_the_count_survives_a_kill_right_after_a_checkpoint(tmp_path: Path) -> None:
    """model_0000005 was written before the evaluation of its iteration, which is not in its history."""
    values = {1: 1.0, 3: 2.0, 5: 1.0, 7: 1.0, 9: 3.0}
    _early(tmp_path, values, stop=6, patience=3)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    resumed = _early(tmp_path, values, start=6, patience=2)
    assert resumed.iter == 8


def test_a_wrong_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', got 'up'"):
        hooks.BestCheckpointer(Checkpointer(ToyModel(), str(tmp_path)), "m", mode="up")
