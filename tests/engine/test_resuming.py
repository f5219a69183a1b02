"""Resumes with another config, forks, and finished runs, as a user starts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dinoengine.checkpoint import CheckpointError
from dinoengine.config import CfgNode, ConfigError
from dinoengine.engine import SSLTrainer, default_argument_parser, default_setup, run_command
from dinoengine.engine.resuming import changes_since, checkpoint_to_fork, saved_config
from tests.conftest import TINY


def _run(folder: Path, *more: object, trainer: type[SSLTrainer] = SSLTrainer) -> Any:
    overrides = [str(word) for key, value in TINY.items() for word in (key, value)]
    rest = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 4, "OUTPUT_DIR", folder, *more]
    return run_command(trainer, ["--num-gpus", "0", *overrides, *(str(word) for word in rest)])


def _refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        _run(*args)
    assert ended.value.code == 2
    return capsys.readouterr().err


def _state(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(*pair) for pair in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file but the log."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("finished")
    _run(folder, "SOLVER.CHECKPOINT_PERIOD", 2)
    return folder


def _go_back(finished: Path, folder: Path) -> Path:
    """That run as it was when it had been killed after two iterations."""
    folder.mkdir()
    for name in ("config.yaml", "model_0000001.pth"):
        (folder / name).write_bytes((finished / name).read_bytes())
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    return folder


def test_accepted_changes_are_shown_once_and_the_run_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _go_back(finished, tmp_path / "run")
    _run(folder, "--resume", "SOLVER.BASE_LR", 0.5, "LOG.PERIOD", 1)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    assert table["SOLVER.BASE_LR"][:2] == ["0.01", "0.5"]
    assert "the LR is that of the new schedule" in table["SOLVER.BASE_LR"][2]
    assert table["LOG.PERIOD"] == ["2", "1", ""]
    assert out.count("What this config changes") == 1
    assert out.index("What this config changes") < out.index("Training from iteration 2 to 4")
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["BASE_LR"] == 0.5
    assert not _same(_state(folder / "model_final.pth")["model"], _state(finished / "model_final.pth")["model"])


def test_refused_changes_leave_the_run_and_name_the_fork(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _go_back(finished, tmp_path / "run")
    before = _files(folder)
    message = _refused(capsys, folder, "--resume", "SOLVER.IMS_PER_BATCH", 8, "SEED", 3, "SOLVER.BASE_LR", 0.5)
    assert "SOLVER.IMS_PER_BATCH was 4, is now 8 (iteration t takes positions" in message
    assert "SEED was 0, is now 3" in message
    assert "SOLVER.BASE_LR" not in message
    assert f"--fork-from {folder} OUTPUT_DIR" in message
    assert _files(folder) == before


def test_what_counts_is_the_config_of_the_checkpoint(finished: Path, tmp_path: Path, tiny_cfg: CfgNode) -> None:
    """config.yaml is of the start of the last process, which may have ended before it saved."""
    folder = _go_back(finished, tmp_path / "run")
    data = _state(folder / "model_0000001.pth")
    (folder / "config.yaml").write_text("SEED: 99\n")
    tiny_cfg.SEED = 5
    path = str(folder / "model_0000001.pth")
    assert ("SEED", 0, 5) in [tuple(change) for change in changes_since(tiny_cfg, data, path)]
    del data["config"]
    assert ("SEED", 99, 5) in [tuple(change) for change in changes_since(tiny_cfg, data, path)]
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="has no config, and there is no config.yaml beside it"):
        changes_since(tiny_cfg, data, path)


def test_keys_of_your_own_resume_and_their_changes_are_refused(tiny_cfg: CfgNode) -> None:
    def start(resume: bool) -> SSLTrainer:
        args = default_argument_parser().parse_args(["--resume"] if resume else [])
        trainer = SSLTrainer(default_setup(tiny_cfg.clone(), args))
        trainer.resume_or_load(resume=resume)
        return trainer

    tiny_cfg.SEED = -1
    tiny_cfg.MINE = CfgNode({"STRENGTH": 1.5, "NAMES": ("a", "b")})
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"])
    start(resume=False).train()
    assert saved_config(tiny_cfg.OUTPUT_DIR)["MINE"] == {"STRENGTH": 1.5, "NAMES": ["a", "b"]}  # type: ignore[index]
    assert start(resume=True).start_iter == 2
    tiny_cfg.MINE.STRENGTH = 2.0
    with pytest.raises(ConfigError, match=r"MINE\.STRENGTH was 1\.5, is now 2\.0 \(not a key of dinoengine"):
        start(resume=True)


def test_a_fork_without_changes_is_the_run_itself(finished: Path, tmp_path: Path) -> None:
    """Model, optimizer, hooks, history and stream: four iterations are two and two."""
    _run(tmp_path / "fork", "--fork-from", finished / "model_0000001.pth", "SOLVER.CHECKPOINT_PERIOD", 2)
    whole, fork = _state(finished / "model_final.pth"), _state(tmp_path / "fork" / "model_final.pth")
    for content in (whole, fork):
        for clock in ("time", "data_time"):
            content["trainer"]["storage"].pop(clock, None)
    assert all(_same(whole[name], fork[name]) for name in ("model", "trainer", "iteration"))


def test_a_fork_takes_any_change_and_is_then_a_run_like_any_other(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, fork = _go_back(finished, tmp_path / "run"), tmp_path / "fork"
    (source / "model_best.json").write_text("{}")
    before = _files(source)
    changes = ("SOLVER.IMS_PER_BATCH", 8, "INPUT.HFLIP_PROB", 0.0)
    line = (fork, "--resume", "--fork-from", source, *changes)
    _run(*line)
    out = capsys.readouterr().out
    assert "Forking from" in out
    assert "| INPUT.HFLIP_PROB" in out
    assert "Training from iteration 2 to 4" in out
    record = json.loads((fork / "fork.json").read_text())
    assert record["source"] == str(source / "model_0000001.pth")
    assert record["iteration"] == 1
    assert record["changes"]["SOLVER.IMS_PER_BATCH"] == {"before": 4, "now": 8}
    assert yaml.safe_load((fork / "config.yaml").read_text())["SOLVER"]["IMS_PER_BATCH"] == 8
    assert not (fork / "model_best.json").exists()
    assert _files(source) == before

    (fork / "last_checkpoint").write_text("model_0000001.pth")  # what the fork saved first
    for path in before:
        (source / path).unlink()
    _run(fork, "--resume", *changes)  # without the source, as a run like any other
    assert "Resuming from" in capsys.readouterr().out
    source.rmdir()
    _run(*line)  # finished, and the line of the queue still does
    assert "Nothing to train" in capsys.readouterr().out
    assert "already holds a run" in _refused(capsys, fork, "--fork-from", finished)


def test_a_fork_that_ended_before_its_first_checkpoint_does_not_start_from_scratch(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dinoengine.checkpoint.Checkpointer.save", lambda *args, **kwargs: None)
        patch.setattr(SSLTrainer, "train", lambda self: {})
        _run(tmp_path / "fork", "--fork-from", finished)
    assert not (tmp_path / "fork" / "last_checkpoint").exists()
    message = _refused(capsys, tmp_path / "fork", "--resume")
    assert f"was to be a fork of {finished}/model_final.pth. Give --fork-from" in message
    _run(tmp_path / "fork", "--resume", "--fork-from", finished, "SOLVER.MAX_ITER", 5)
    assert _state(tmp_path / "fork" / "model_final.pth")["iteration"] == 4


def test_the_drawn_seed_of_a_run_is_that_of_its_fork(finished: Path, tmp_path: Path) -> None:
    _run(tmp_path / "run", "SEED", -1)
    _run(tmp_path / "fork", "--fork-from", tmp_path / "run", "SEED", -1, "SOLVER.MAX_ITER", 5)
    first, second = saved_config(str(tmp_path / "run")), saved_config(str(tmp_path / "fork"))
    assert first is not None
    assert second is not None
    assert first["SEED"] == second["SEED"] >= 0


def test_a_source_may_end_in_a_slash_as_a_shell_completes_it(finished: Path, tmp_path: Path) -> None:
    shards = tmp_path / "model_0000001.dcp"
    shards.mkdir()
    (shards / "manifest.json").write_text("{}")
    for source in (f"{shards}", f"{shards}/", f"{shards}//"):
        assert checkpoint_to_fork(source) == str(shards)
    assert checkpoint_to_fork(f"{finished}/") == str(finished / "model_final.pth")


def test_nothing_to_fork_from_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint \(last_checkpoint\)"):
        checkpoint_to_fork(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected the OUTPUT_DIR of a run, or one of its checkpoints"):
        checkpoint_to_fork(str(tmp_path / "none"))
    assert "does not exist" in _refused(capsys, tmp_path / "fork", "--fork-from", tmp_path / "none")
    assert "--eval-only name the weights" in _refused(capsys, tmp_path / "fork", "--eval-only", "--fork-from", tmp_path)
    assert not (tmp_path / "fork").exists()


def test_weights_alone_are_no_run_to_fork_from(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = _state(finished / "model_final.pth")
    del content["digest"], content["iteration"]
    torch.save(content, tmp_path / "weights.pth")
    message = _refused(capsys, tmp_path / "fork", "--fork-from", tmp_path / "weights.pth")
    assert "weights.pth says no iteration, so it is no checkpoint of a run" in message


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return edit


def _drop_moments(content: dict[str, Any]) -> None:
    content["trainer"]["optimizer"]["state"].pop(0)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_drop("trainer"), "lacks the state of trainer"),
        (_drop("trainer", "optimizer"), "it lacks optimizer"),
        (_drop("trainer", "storage"), "it lacks storage"),
        (_drop("trainer", "hooks"), "it lacks hooks"),
        (_drop("trainer", "hooks", "NonFiniteGuard"), "no state for hook 'NonFiniteGuard'"),
        (_drop_moments, "lacks moments of student."),
    ],
)
def test_missing_state_is_named_by_resume(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[dict[str, Any]], None],
    named: str,
) -> None:
    folder = _go_back(finished, tmp_path / "run")
    content = _state(folder / "model_0000001.pth")
    content.pop("digest", None)  # of what it held before
    edit(content)
    torch.save(content, folder / "model_0000001.pth")
    assert named in _refused(capsys, folder, "--resume")


class _Killed(SSLTrainer):
    """Ends in its final evaluation."""

    @classmethod
    def test(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise KeyboardInterrupt


_EVALUATE = ("DATASETS.TEST", TINY["DATASETS.TEST"])
_EARLY = (
    *(*_EVALUATE, "TEST.EVALUATORS", "('label_free',)", "SOLVER.BASE_LR", 0.0, "SOLVER.MIN_LR", 0.0),
    *("TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "label_free/rankme", "TEST.EARLY_STOPPING_PATIENCE", 1),
)


@pytest.mark.parametrize("words", [(), _EVALUATE, _EARLY], ids=["trained", "evaluated", "stopped early"])
def test_resuming_a_finished_run_says_so_and_changes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...]
) -> None:
    first = _run(tmp_path, *words)
    before = _files(tmp_path)
    capsys.readouterr()
    assert _run(tmp_path, *words, "--resume", "DATALOADER.PREFETCH_FACTOR", 3) == first
    assert "Nothing to train" in capsys.readouterr().out
    assert _files(tmp_path) == before


def test_a_run_killed_in_its_final_evaluation_has_it_done_and_is_then_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, *_EVALUATE, trainer=_Killed)
    trained = _files(tmp_path)
    results = _run(tmp_path, *_EVALUATE, "--resume")
    evaluated = _files(tmp_path)
    assert {name: evaluated[name] for name in trained} == trained
    assert {name.split("/")[0] for name in evaluated.keys() - trained.keys()} == {"results.json", "eval"}
    assert _run(tmp_path, *_EVALUATE, "--resume") == results
    assert _files(tmp_path) == evaluated
    for damaged in ("", "[]"):
        (tmp_path / "results.json").write_text(damaged)
        assert _run(tmp_path, *_EVALUATE, "--resume") == results
