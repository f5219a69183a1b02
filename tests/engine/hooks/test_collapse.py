"""The collapse guard on scripted metrics, on a run that collapses for real, and on one that does not."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinoengine.checkpoint import Checkpointer
from dinoengine.config import CfgNode, validate
from dinoengine.engine import SSLTrainer, hooks
from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.command import train_or_evaluate
from dinoengine.engine.hooks import CollapseError, CollapseGuard
from dinoengine.engine.hooks.collapse_symptoms import ADVICE, STEP_KINDS, TEST_KINDS, Scales
from dinoengine.utils.registry import suggest
from tests.engine.toys import IdleTrainer, ToyModel
from tests.test_architecture import _keys

K = 16
LOG_K = math.log(K)
HEALTHY = {
    "feature_std_relative": 0.9,
    "teacher_entropy": 0.8 * LOG_K,
    "prototype_perplexity": 10.0,
    "loss_dino_global": 0.3 * LOG_K,
    "loss_dino_local": 0.6 * LOG_K,
}
STEP_CASES = {
    "constant features": {"feature_std_relative": 0.01},
    "uniform targets": {"teacher_entropy": 0.999 * LOG_K},
    "a single prototype for all images": {"prototype_perplexity": 1.01},
    "loss stuck at log K": {"loss_dino_global": 0.4 * LOG_K, "loss_dino_local": 0.6001 * LOG_K},
}
Script = Callable[[int], dict[str, float]]


def _scales(**changes: Any) -> Scales:
    return Scales(**{"num_prototypes": K, "dino_weight": 1.0, "images_per_process": 8, "window": 2, **changes})


def _run(
    folder: Path,
    script: Script,
    *,
    start: int = 0,
    stop: int = 30,
    fail_at: int | None = None,
    scales: Scales | None = None,
    best: str = "",
    **options: Any,
) -> IdleTrainer:
    """Iterations whose metrics are ``script(iteration)``; a checkpoint every four. Names with a slash are results."""
    trainer = IdleTrainer(fail_at)
    checkpointer = Checkpointer(ToyModel(), str(folder), trainer=trainer)

    def put(t: Any) -> None:
        for name, value in script(t.iter).items():
            if "/" in name:
                t.storage.put_scalar(name, value, smoothing_hint=False, role="eval")
            else:
                t.storage.put_scalar(name, value, role="loss" if name.startswith("loss") else "metric")

    guard = CollapseGuard(checkpointer, scales or _scales(), **{"action": "stop", "patience": 3, **options})
    saving: list[hooks.HookBase] = [hooks.PeriodicCheckpointer(checkpointer, 4, 100)]
    if best:
        saving.append(hooks.BestCheckpointer(checkpointer, best))
    trainer.register_hooks([hooks.CallbackHook(after_step=put), *saving, guard])
    if start:
        assert checkpointer.resume_or_load("") == start
    trainer.train(start, stop)
    return trainer


@pytest.mark.parametrize("kind", STEP_CASES)
def test_each_symptom_is_named_with_what_to_try_after_patience(tmp_path: Path, kind: str) -> None:
    script: Script = lambda i: {**HEALTHY, **(STEP_CASES[kind] if i >= 10 else {})}  # noqa: E731
    with pytest.raises(CollapseError) as caught:
        _run(tmp_path, script)
    # Readings at 11 (its window of two is all bad), 13 and 15.
    assert str(caught.value).startswith(f"Training looks collapsed at iteration 15: {kind} (")
    assert f"in 3 readings in a row. Try: {ADVICE[kind]}." in str(caught.value)
    assert str(caught.value).count("Try:") == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000015.pth"


def test_advice_names_keys_that_exist(tiny_cfg: CfgNode) -> None:
    assert ADVICE.keys() == {*STEP_KINDS, *TEST_KINDS} == {*STEP_CASES, *TEST_KINDS}
    known = _keys(tiny_cfg)
    for text in ADVICE.values():
        for word in text.replace(",", " ").replace(";", " ").replace(")", " ").split():
            if word.split(".")[0] in ("MODEL", "SOLVER", "INPUT"):
                assert word in known, suggest(word, known)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda i: HEALTHY, id="healthy"),
        pytest.param(lambda i: {}, id="a model without these metrics"),
        pytest.param(lambda i: {**HEALTHY, **(STEP_CASES["uniform targets"] if i % 6 < 4 else {})}, id="recovers"),
        pytest.param(lambda i: {**HEALTHY, **(STEP_CASES["constant features"] if i < 20 else {})}, id="in grace"),
        pytest.param(lambda i: {**HEALTHY, "feature_std_relative": math.nan}, id="not a number"),
    ],
)
def test_silent(tmp_path: Path, script: Script) -> None:
    assert _run(tmp_path, script, grace_iters=16).succeeded


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("constant features", {"images_per_process": 4}),
        ("a single prototype for all images", {"images_per_process": 4}),
        ("uniform targets", {"num_prototypes": 2}),
        ("loss stuck at log K", {"dino_weight": 0.0}),
    ],
)
def test_what_the_metrics_cannot_show_is_not_judged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, changes: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, logger="dinoengine")
    assert _run(tmp_path, lambda i: {**HEALTHY, **STEP_CASES[kind]}, scales=_scales(**changes)).succeeded
    is_said = "does not judge the spread of features and the use of prototypes: a process has 4 images" in caplog.text
    assert is_said == ("images_per_process" in changes)


def test_the_loss_is_read_without_its_weight(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="loss stuck at log K"):
        _run(tmp_path, lambda i: {"loss_dino_global": 0.5 * LOG_K}, scales=_scales(dino_weight=0.5))


def test_warn_says_so_once_and_again_after_a_recovery(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dinoengine")
    script: Script = lambda i: {**HEALTHY, **(STEP_CASES["uniform targets"] if i % 16 < 12 else {})}  # noqa: E731
    assert _run(tmp_path, script, action="warn", stop=32).succeeded
    said = [record.message.split(":")[0] for record in caplog.records if "collapse" in record.name]
    assert said == [
        "Training looks collapsed at iteration 5",
        "Iteration 13",
        "Training looks collapsed at iteration 21",
        "Iteration 29",
    ]


def _results(i: int, values: list[float], every: int = 2) -> dict[str, float]:
    return {"digits/label_free/rankme_share": values[i // every]} if i % every == every - 1 else {}


def test_rank_that_falls_is_dimensional_collapse_and_low_rank_from_the_start_is_not(tmp_path: Path) -> None:
    with pytest.raises(
        CollapseError, match=r"iteration 9: dimensional collapse \(digits/label_free/rankme_share 0.060"
    ):
        _run(tmp_path / "a", lambda i: _results(i, [0.3, 0.5, 0.09, 0.07, 0.06, 0.5]), stop=12)
    assert _run(tmp_path / "b", lambda i: _results(i, [0.01, 0.02, 0.03, 0.05, 0.09, 0.2]), stop=12).succeeded
    # One evaluation is one reading, however many iterations go by.
    assert _run(tmp_path / "c", lambda i: _results(i, [0.5, 0.05, 0.05], every=8), stop=24).succeeded


def test_constant_features_in_the_test_set(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="constant features in the test set"):
        _run(tmp_path, lambda i: {"label_free/feature_std_relative": 1e-4})


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_rollback_points_to_the_last_checkpoint_before_it_and_a_resumed_run_takes_it(tmp_path: Path) -> None:
    bad = STEP_CASES["uniform targets"]
    script: Script = lambda i: {**HEALTHY, **(bad if i >= 10 else {})}  # noqa: E731
    with pytest.raises(CollapseError, match=r"last_checkpoint is now model_0000007\.pth(.|\n)*--resume KEY VALUE"):
        _run(tmp_path, script, action="rollback")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    assert _names(tmp_path) == [
        "collapsed_0000011.pth",
        "collapsed_0000015.pth",
        "model_0000003.pth",
        "model_0000007.pth",
    ]
    # The same settings again: at 7 it was healthy, so this is where it returns to; never to a collapsed one.
    with pytest.raises(CollapseError, match=r"last_checkpoint is now model_0000007\.pth"):
        _run(tmp_path, script, start=8, action="rollback")
    assert _run(tmp_path, lambda i: HEALTHY, start=8, action="rollback").succeeded


@pytest.mark.parametrize(("best_at", "is_abandoned"), [(13, True), (8, True), (7, False), (5, False)])
def test_a_best_of_the_abandoned_iterations_is_not_the_best_of_the_run(
    tmp_path: Path, best_at: int, is_abandoned: bool
) -> None:
    bad = STEP_CASES["uniform targets"]
    script: Script = lambda i: {  # noqa: E731
        **HEALTHY,
        **(bad if i >= 10 else {}),
        **({"knn/top1": 90.0 if i == best_at else 10.0} if i % 2 or i == best_at else {}),
    }
    with pytest.raises(CollapseError, match=r"last_checkpoint is now model_0000007\.pth"):
        _run(tmp_path, script, action="rollback", best="knn/top1")
    assert {path.name for path in tmp_path.glob("*_best.*")} == {
        f"{'collapsed' if is_abandoned else 'model'}_best.{kind}" for kind in ("pth", "json")
    }
    # The value of the abandoned iterations is nothing that what comes after the rollback must be better than.
    _run(tmp_path, lambda i: {**HEALTHY, **({"knn/top1": 50.0} if i == 9 else {})}, start=8, best="knn/top1", stop=12)
    value = json.loads((tmp_path / "model_best.json").read_text())["value"]
    assert value == (50.0 if is_abandoned else 90.0)


def test_a_checkpoint_that_was_collapsed_before_the_run_was_resumed_is_no_healthy_one(tmp_path: Path) -> None:
    script: Script = lambda i: {**HEALTHY, **(STEP_CASES["uniform targets"] if i >= 6 else {})}  # noqa: E731
    _run(tmp_path, script, stop=12, action="warn", patience=100)  # ends with model_final, and was never judged
    with pytest.raises(CollapseError, match=r"last_checkpoint is now model_0000003\.pth"):
        _run(tmp_path, script, start=12, action="rollback")
    later = ["collapsed_0000007.pth", "collapsed_0000011.pth", "collapsed_0000015.pth", "collapsed_final.pth"]
    assert _names(tmp_path) == [*later, "model_0000003.pth"]


def test_rollback_without_a_healthy_checkpoint_leaves_everything(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="There is no checkpoint from before it"):
        _run(tmp_path, lambda i: STEP_CASES["uniform targets"], action="rollback")
    assert _names(tmp_path) == ["model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def _iteration_of(error: pytest.ExceptionInfo[CollapseError]) -> str:
    return str(error.value).partition(":")[0]


@pytest.mark.parametrize("kind", [*STEP_CASES, "dimensional collapse"])
@pytest.mark.parametrize("fail_at", [9, 12, 13, 14, 17])
def test_a_run_that_was_killed_acts_when_the_uninterrupted_one_would(tmp_path: Path, kind: str, fail_at: int) -> None:
    """Checkpoints are written at 3, 7, 11, 15, before the readings of these very iterations."""

    def script(i: int) -> dict[str, float]:
        rank = 0.05 if i >= 9 else 0.5
        return {**HEALTHY, **_results(i, [rank] * 15)} if kind not in STEP_CASES else {**HEALTHY, **steps(i)}

    def steps(i: int) -> dict[str, float]:
        return STEP_CASES[kind] if i >= 8 else {}

    with pytest.raises(CollapseError) as uninterrupted:
        _run(tmp_path / "a", script, patience=5)
    with pytest.raises(RuntimeError, match="step failed"):
        _run(tmp_path / "b", script, patience=5, fail_at=fail_at)
    last = int((tmp_path / "b" / "last_checkpoint").read_text()[6:13])
    with pytest.raises(CollapseError) as resumed:
        _run(tmp_path / "b", script, patience=5, start=last + 1)
    assert _iteration_of(resumed) == _iteration_of(uninterrupted) == "Training looks collapsed at iteration 17"


def test_a_resumed_run_does_not_warn_a_second_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script: Script = lambda i: {**HEALTHY, **STEP_CASES["uniform targets"]}  # noqa: E731
    _run(tmp_path, script, action="warn", stop=12)
    assert caplog.text.count("looks collapsed") == 1
    _run(tmp_path, script, action="warn", start=12)
    assert caplog.text.count("looks collapsed") == 1


def test_readings_count_anew_with_another_action_or_patience(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script: Script = lambda i: {**HEALTHY, **STEP_CASES["uniform targets"]}  # noqa: E731
    _run(tmp_path, script, action="warn", stop=12)
    with pytest.raises(CollapseError, match="iteration 15"):  # the third from 11 on, which model_final lacks
        _run(tmp_path, script, action="stop", start=12)
    _run(tmp_path / "b", script, action="warn", stop=12)
    caplog.clear()
    _run(tmp_path / "b", script, action="warn", patience=4, start=12)
    assert "looks collapsed at iteration 17" in caplog.text


def test_a_run_that_was_stopped_has_the_whole_patience_again(tmp_path: Path) -> None:
    script: Script = lambda i: {**HEALTHY, **(STEP_CASES["uniform targets"] if i < 9 else {})}  # noqa: E731
    with pytest.raises(CollapseError, match="iteration 5"):
        _run(tmp_path, script)
    assert _run(tmp_path, script, start=6).succeeded  # readings at 7 and 9 show it still
    with pytest.raises(CollapseError, match="iteration 5"):
        _run(tmp_path / "b", script)
    with pytest.raises(CollapseError, match="iteration 11"):
        _run(tmp_path / "b", lambda i: {**HEALTHY, **STEP_CASES["uniform targets"]}, start=6)


def test_a_run_may_get_a_guard_when_it_is_resumed(tmp_path: Path) -> None:
    trainer = IdleTrainer()
    checkpointer = Checkpointer(ToyModel(), str(tmp_path), trainer=trainer)
    trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, 4, 100)])
    trainer.train(0, 8)
    with pytest.raises(CollapseError, match="iteration 13"):
        _run(tmp_path, lambda i: STEP_CASES["uniform targets"], start=8)


def test_a_wrong_action_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="action must be one of warn, stop, rollback; got 'panic'"):
        CollapseGuard(Checkpointer(ToyModel(), str(tmp_path)), _scales(), action="panic")


QUICK = {"SOLVER.IMS_PER_BATCH": 8, "DATASETS.TEST": "()", "LOG.PERIOD": 1, "COLLAPSE_GUARD.PATIENCE": 3}


def _configure(cfg: CfgNode, **changes: Any) -> CfgNode:
    cfg.merge_from_list([word for name, value in {**QUICK, **changes}.items() for word in (name, str(value))])
    validate(cfg)
    return cfg


def test_a_run_that_collapses_for_real_ends_with_one_message(
    tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without centring (a centre that never moves) and with sharp targets all images get the same prototype."""
    _configure(tiny_cfg, **{"MODEL.LOSS.CENTER_MOMENTUM": 1.0, "MODEL.LOSS.KOLEO_WEIGHT": 0.0})
    _configure(tiny_cfg, **{"MODEL.TEACHER.WARMUP_TEMP": 0.02, "MODEL.TEACHER.TEMP": 0.02})
    _configure(tiny_cfg, **{"COLLAPSE_GUARD.ACTION": "stop", "COLLAPSE_GUARD.GRACE_ITERS": 3, "SOLVER.MAX_ITER": 40})
    monkeypatch.setattr("dinoengine.engine.command.default_setup", lambda cfg, args: cfg)  # it takes seconds
    with pytest.raises(SystemExit) as caught:
        train_or_evaluate(tiny_cfg, default_argument_parser().parse_args([]))
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert (out + error).count("looks collapsed at iteration") == 1
    assert "error: Training looks collapsed at iteration" in error
    assert "a single prototype for all images (prototype_perplexity 1" in error
    assert "Traceback" not in error
    last = Path(tiny_cfg.OUTPUT_DIR, "last_checkpoint").read_text()
    assert last.startswith("model_00000")
    assert Path(tiny_cfg.OUTPUT_DIR, last).exists()


def test_a_healthy_run_is_not_disturbed(tiny_cfg: CfgNode) -> None:
    _configure(tiny_cfg, **{"COLLAPSE_GUARD.ACTION": "stop", "COLLAPSE_GUARD.GRACE_ITERS": 10, "SOLVER.MAX_ITER": 20})
    trainer = SSLTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.succeeded
    assert trainer.storage.latest().keys() >= {"feature_std_relative", "prototype_perplexity", "teacher_entropy"}


def test_damaged_files_do_not_hide_the_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = STEP_CASES["uniform targets"]
    script: Script = lambda i: {**HEALTHY, **(bad if i >= 10 else {}), "knn/top1": 100.0 - i}  # noqa: E731
    _run(tmp_path, script, stop=12, action="warn", patience=100, best="knn/top1")
    (tmp_path / "model_best.pth").write_bytes(b"damaged")
    with pytest.raises(CollapseError, match=r"uniform targets(.|\n)*last_checkpoint is now model_0000007\.pth"):
        _run(tmp_path, script, start=12, action="rollback")
    assert "collapsed_best.pth" in _names(tmp_path)
    assert "No checkpoint to go back to: " in caplog.text


def test_a_rollback_that_fails_does_not_hide_the_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CollapseGuard, kinds: list[str]) -> None:
        raise OSError(28, "No space left on device")

    script: Script = lambda i: {**HEALTHY, **(STEP_CASES["uniform targets"] if i >= 10 else {})}  # noqa: E731
    monkeypatch.setattr(CollapseGuard, "_roll_back", fail)
    with pytest.raises(CollapseError, match=r"uniform targets(.|\n)*rollback failed: .*No space left"):
        _run(tmp_path, script, action="rollback")
