"""When checkpoints are written, kept, and called best."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import Checkpointer
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
