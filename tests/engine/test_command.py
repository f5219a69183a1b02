"""The command in this process; tests/end_to_end runs it as users do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dinoengine.data import DatasetCatalog
from dinoengine.data.datasets import Synthetic
from dinoengine.engine import SSLTrainer, run_command
from tests.conftest import TINY


def _words(folder: Path, *more: object) -> list[str]:
    overrides = [str(word) for key, value in TINY.items() for word in (key, value)]
    return ["--num-gpus", "0", *overrides, "OUTPUT_DIR", str(folder), *(str(word) for word in more)]


class Ending(SSLTrainer):
    """Is stopped in its last evaluation, as by a time limit."""

    @classmethod
    def test(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise KeyboardInterrupt


def test_a_subclass_is_trained_and_evaluated(tmp_path: Path) -> None:
    class Mine(SSLTrainer):
        @classmethod
        def report(cls, cfg: Any, results: dict[str, Any], weights: str = "") -> Any:
            reports.append(results)
            return {}

    reports: list[dict[str, Any]] = []
    trained = run_command(Mine, _words(tmp_path, "SOLVER.MAX_ITER", 2))
    evaluated = run_command(Mine, _words(tmp_path, "--eval-only", "MODEL.WEIGHTS", tmp_path / "model_final.pth"))
    assert trained == evaluated
    assert reports == [trained, evaluated]


def test_the_log_says_what_the_start_took(tmp_path: Path) -> None:
    run_command(SSLTrainer, _words(tmp_path, "SOLVER.MAX_ITER", 2))
    (line,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "First iteration after" in line]
    names = re.findall(r"[:,] ([a-z]+) \d+\.\d", line)
    assert names == ["imports", "setup", "data", "model", "optimizer", "checkpoint", "hooks", "batch", "step"]


def test_eval_only_does_not_train(tmp_path: Path) -> None:
    run_command(SSLTrainer, _words(tmp_path, "SOLVER.MAX_ITER", 2))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and p.name != "log.txt"}
    run_command(SSLTrainer, _words(tmp_path, "--eval-only", "MODEL.WEIGHTS", tmp_path / "model_final.pth"))
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and p.name != "log.txt"}
    assert after == before


def test_the_table_of_eval_only_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(SSLTrainer, _words(tmp_path / "run", "SOLVER.MAX_ITER", 2))
    assert "trained teacher" in capsys.readouterr().out
    path = tmp_path / "run" / "model_final.pth"
    for words in (("MODEL.WEIGHTS", path), ("--resume",)):
        run_command(SSLTrainer, _words(tmp_path / "run", "--eval-only", *words))
        out = capsys.readouterr().out
        assert f"\nWeights: {path}\n" in out
        assert "trained teacher" not in out


def test_a_run_stopped_in_its_last_evaluation_is_evaluated_by_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_command(Ending, _words(tmp_path, "SOLVER.MAX_ITER", 2))
    assert (tmp_path / "model_final.pth").exists()
    assert not (tmp_path / "results.json").exists()
    results = run_command(SSLTrainer, _words(tmp_path, "SOLVER.MAX_ITER", 2, "--resume"))
    assert 0 <= results["knn"]["top1_k1"] <= 100
    assert (tmp_path / "results.json").exists()
    assert run_command(SSLTrainer, _words(tmp_path, "SOLVER.MAX_ITER", 2, "--resume")) == results


@pytest.mark.parametrize("content", [None, b"no weights"], ids=["missing", "damaged"])
def test_weights_that_cannot_be_read_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        run_command(SSLTrainer, _words(tmp_path / "run", "MODEL.WEIGHTS", tmp_path / "w.pth"))
    assert ended.value.code == 2
    assert str(tmp_path / "w.pth") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_results_of_an_earlier_end_or_of_other_datasets_are_not_shown(tmp_path: Path) -> None:
    class Counting(SSLTrainer):
        @classmethod
        def test(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            results: dict[str, Any] = super().test(*args, **kwargs)
            evaluated.append(list(results))
            return results

    evaluated: list[list[str]] = []
    run_command(Counting, _words(tmp_path, "SOLVER.MAX_ITER", 2))
    with pytest.raises(KeyboardInterrupt):  # extended, and stopped after the last checkpoint
        run_command(Ending, _words(tmp_path, "SOLVER.MAX_ITER", 4, "--resume"))
    extended = _words(tmp_path, "SOLVER.MAX_ITER", 4, "--resume")
    run_command(Counting, extended)
    assert len(evaluated) == 2
    assert json.loads((tmp_path / "results.json").read_text())["iteration"] == 4
    run_command(Counting, extended)
    assert len(evaluated) == 2  # now they are those of this end
    datasets = [f"synthetic:num_images={n}:num_classes=3:size=12" for n in (6, 9)]
    results = run_command(Counting, [*extended, "DATASETS.TEST", str(tuple(datasets))])
    assert list(results) == evaluated[2] == datasets
    assert list(json.loads((tmp_path / "results.json").read_text())["tables"]) == datasets


def test_results_are_kept_and_judged_again_by_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(tmp_path, "SOLVER.MAX_ITER", 2, "TEST.EXPECTED_RESULTS", "(('knn', 'top1_k1', 200.0, 1.0),)")
    with pytest.raises(SystemExit) as first:
        run_command(SSLTrainer, words)
    assert "trained teacher" in capsys.readouterr().out  # the table comes before the verdict
    with pytest.raises(SystemExit) as second:
        run_command(SSLTrainer, [*words, "--resume"])
    assert (first.value.code, second.value.code) == (1, 1)


def test_a_resume_that_does_not_fit_leaves_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(SSLTrainer, _words(tmp_path, "SOLVER.MAX_ITER", 2))
    before = (tmp_path / "config.yaml").read_bytes()
    more = ("SOLVER.MAX_ITER", 4, "--resume", "MODEL.DINO_HEAD.NUM_PROTOTYPES", 77)
    with pytest.raises(SystemExit):
        run_command(SSLTrainer, _words(tmp_path, *more))
    message = capsys.readouterr().err
    assert "MODEL.DINO_HEAD.NUM_PROTOTYPES was 16, is now 77 (another model" in message
    assert (tmp_path / "config.yaml").read_bytes() == before
    run_command(SSLTrainer, _words(tmp_path, "SOLVER.MAX_ITER", 4, "--resume"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("TEST.EVALUATORS", "('knn','liner')"), "No 'liner' in the EVALUATOR registry (did you mean 'linear'?)"),
        (("DATASETS.TEST", "without labels"), "'knn' needs labels, and the test set"),
        (("TEST.EVALUATORS", "('knn','knn')"), "names an evaluator twice"),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_the_model_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], message: str
) -> None:
    class NeverBuilt(SSLTrainer):
        @classmethod
        def build_model(cls, cfg: Any) -> Any:
            raise AssertionError("the model was built")

    class NoLabels(Synthetic):
        def __init__(self) -> None:
            super().__init__(4)
            self.class_names = None

    torch.save({"model": {}}, tmp_path / "w.pth")
    DatasetCatalog.register("without labels", NoLabels)
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(
                NeverBuilt,
                _words(tmp_path / "run", "--eval-only", *words, "MODEL.WEIGHTS", tmp_path / "w.pth"),
            )
    finally:
        DatasetCatalog.remove("without labels")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
