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


def test_a_wrong_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', got 'up'"):
        hooks.BestCheckpointer(Checkpointer(ToyModel(), str(tmp_path)), "m", mode="up")
