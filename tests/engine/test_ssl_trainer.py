"""Whole runs: exact resume, what they leave behind, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.config import CfgNode
from dinoengine.engine import SSLTrainer, hooks


def _train(cfg: CfgNode, *, stop: int | None = None, resume: bool = False) -> SSLTrainer:
    """A run, killed (by an exception in a hook) before iteration ``stop`` if given."""
    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop is None:
        trainer.train()
        return trainer

    def die(t: Any) -> None:
        if t.iter == stop:
            raise KeyboardInterrupt

    trainer.register_hooks([hooks.CallbackHook(before_step=die)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def _rows(cfg: CfgNode) -> list[dict[str, Any]]:
    text = Path(cfg.OUTPUT_DIR, "metrics.json").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "data_time")} for row in rows]


def _assert_equal_runs(a: SSLTrainer, b: SSLTrainer) -> None:
    for (name, x), y in zip(a.bare_model.state_dict().items(), b.bare_model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    first, second = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for key, state in first["state"].items():
        assert all(torch.equal(state[k], second["state"][key][k]) for k in state)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.VIT.DROP_PATH_RATE", 0.3, "MODEL.LOSS.CENTERING", "sinkhorn_knopp", "MODEL.IBOT_HEAD.SEPARATE", True],
        ["SOLVER.NUM_MICRO_BATCHES", 2, "MODEL.LOSS.KOLEO_GROUP_SIZE", 2, "DATALOADER.NUM_WORKERS", 1],
        ["INPUT.AUGMENTATION_BACKEND", "device", "DATALOADER.NUM_WORKERS", 1, "DATALOADER.PREFETCH_FACTOR", 1],
    ],
    ids=["centering", "drop path, sinkhorn, two heads", "micro-batches, worker", "crops on the device"],
)
def test_a_killed_and_resumed_run_is_bitwise_the_uninterrupted_one(
    tiny_cfg: CfgNode, tmp_path: Path, opts: list[Any]
) -> None:
    tiny_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 5, "LOG.PERIOD", 4, *opts])
    straight = _train(tiny_cfg)
    other = tiny_cfg.clone()
    other.OUTPUT_DIR = str(tmp_path / "killed")
    _train(other, stop=8)
    assert Path(other.OUTPUT_DIR, "last_checkpoint").read_text() == "model_0000005.pth"
    resumed = _train(other, resume=True)
    assert resumed.start_iter == 6
    _assert_equal_runs(straight, resumed)
    assert _rows(other) == _rows(tiny_cfg)


def test_crops_of_the_device_train_as_the_reference_and_a_run_may_change_to_them(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    tiny_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 3, "LOG.PERIOD", 1])
    runs = {name: tiny_cfg.clone() for name in ("reference", "device", "changed")}
    for name, cfg in runs.items():
        cfg.OUTPUT_DIR = str(tmp_path / name)
    _train(runs["reference"])
    runs["device"].INPUT.AUGMENTATION_BACKEND = "device"
    _train(runs["device"])
    _train(runs["changed"], stop=5)
    runs["changed"].INPUT.AUGMENTATION_BACKEND = "device"
    assert _train(runs["changed"], resume=True).start_iter == 3
    expected, *others = ([row["total_loss"] for row in _rows(cfg) if "total_loss" in row] for cfg in runs.values())
    assert len(expected) == tiny_cfg.SOLVER.MAX_ITER
    for found in others:
        assert found == pytest.approx(expected, rel=2e-3)
    assert others[1][:3] == expected[:3]  # made by the reference
    assert others[0] != expected


def test_the_log_has_one_row_per_iteration_and_every_term(tiny_cfg: CfgNode) -> None:
    _train(tiny_cfg)
    rows = _rows(tiny_cfg)
    assert [row["iteration"] for row in rows] == list(range(11))
    terms = {"loss_dino_global", "loss_dino_local", "loss_ibot", "loss_koleo"}
    schedules = {"lr", "last_layer_lr", "weight_decay", "teacher_momentum", "teacher_temp"}
    for row in rows[:-1]:
        assert terms | schedules | {"total_loss", "grad_norm"} <= row.keys()
        assert sum(row[t] for t in terms) == pytest.approx(row["total_loss"], rel=1e-5)
    assert {"knn/top1_k1", "knn/top1_k3"} <= rows[-1].keys()
    assert [row["last_layer_lr"] for row in rows[:3]] == [0.0, rows[1]["lr"], rows[2]["lr"]]


def test_a_finished_run_resumed_shows_its_table_and_changes_nothing(
    tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_cfg.merge_from_list(["TEST.BASELINES", "('pixels','untrained')", "SOLVER.MAX_ITER", 3])
    _train(tiny_cfg)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("knn", "top1"))]
    assert table[0].split() == ["knn", "unit", "raw", "pixels", "untrained", "backbone", "trained", "teacher"]
    assert len(table) == 3  # two numbers of neighbours
    before = {
        p.name: p.read_bytes() for p in Path(tiny_cfg.OUTPUT_DIR).rglob("*") if p.is_file() and p.name != "log.txt"
    }
    _train(tiny_cfg, resume=True)
    out = capsys.readouterr().out
    assert "Nothing to train: iteration 3 of 3 is done already." in out
    assert [line for line in out.splitlines() if line.startswith(("knn", "top1"))] == table
    assert {
        p.name: p.read_bytes() for p in Path(tiny_cfg.OUTPUT_DIR).rglob("*") if p.is_file() and p.name != "log.txt"
    } == before


def test_a_finished_run_is_evaluated_again_when_asked_for_something_else(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 2
    _train(tiny_cfg)
    tiny_cfg.merge_from_list(["TEST.EVALUATORS", "('label_free',)", "TEST.BASELINES", "('pixels',)"])
    assert _train(tiny_cfg, resume=True).last_results.keys() == {"label_free"}


def test_a_run_that_stopped_early_has_its_end_and_resumes_only_with_another_patience(
    tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_cfg.merge_from_list(["SOLVER.BASE_LR", 0.0, "SOLVER.MIN_LR", 0.0])  # nothing can get better
    tiny_cfg.merge_from_list(["TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", "label_free/rankme", "SOLVER.MAX_ITER", 7])
    tiny_cfg.merge_from_list(["TEST.EVALUATORS", "('label_free',)", "TEST.EARLY_STOPPING_PATIENCE", 1])
    first = _train(tiny_cfg)
    assert first.iter == 4
    folder = Path(tiny_cfg.OUTPUT_DIR)
    assert torch.load(folder / "model_final.pth")["iteration"] == 3
    assert json.loads((folder / "results.json").read_text())["results"] == first.last_results
    assert "Stopping after iteration 4 of 7: no label_free/rankme better than" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "log.txt"}
    again = _train(tiny_cfg, resume=True)
    assert again.last_results == first.last_results
    assert "Nothing to train: the run stopped early after iteration 4 of 7" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "log.txt"} == before
    tiny_cfg.TEST.EARLY_STOPPING_PATIENCE = 2
    assert _train(tiny_cfg, resume=True).iter == 6
    tiny_cfg.TEST.BEST_METRIC = "label_free/alpha"
    assert _train(tiny_cfg, resume=True).iter == 7


def test_more_iterations_continue_a_finished_run(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 4
    _train(tiny_cfg)
    tiny_cfg.SOLVER.MAX_ITER = 6
    trainer = _train(tiny_cfg, resume=True)
    assert (trainer.start_iter, trainer.iter) == (4, 6)
    assert [row["iteration"] for row in _rows(tiny_cfg)] == [0, 1, 2, 3, 4, 5, 6]


def test_the_untrained_baseline_is_the_model_training_started_from(tiny_cfg: CfgNode) -> None:
    trainer = SSLTrainer(tiny_cfg)
    fresh = SSLTrainer.build_model(tiny_cfg)
    for (name, x), y in zip(trainer.bare_model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    results = SSLTrainer.test(tiny_cfg, fresh)
    tiny_cfg.MODEL.WEIGHTS = "trained.pth"
    assert SSLTrainer._untrained_results(tiny_cfg) == results
    (record,) = Path(tiny_cfg.OUTPUT_DIR, "eval").glob("*.json")  # the same weights, so the same file
    assert json.loads(record.read_text())["weights"]["file"] == ""


def test_every_checkpoint_holds_only_data_and_the_teacher_of_its_iteration(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 5])
    teachers = {}
    trainer = SSLTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    spy = hooks.CallbackHook(
        after_step=lambda t: teachers.setdefault(
            t.iter, {k: v.clone() for k, v in t.bare_model.state_dict().items() if k.startswith("teacher.")}
        )
    )
    trainer.register_hooks([spy])
    trainer.train()
    for iteration in (1, 3):
        saved = torch.load(Path(tiny_cfg.OUTPUT_DIR, f"model_000000{iteration}.pth"), weights_only=True)
        assert saved["iteration"] == iteration
        assert saved.keys() == {"model", "trainer", "config", "iteration", "digest"}
        assert all(torch.equal(saved["model"][k], v) for k, v in teachers[iteration].items())


@pytest.mark.parametrize(
    ("opts", "terms"),
    [
        (["MODEL.LOSS.IBOT_WEIGHT", 0, "MODEL.LOSS.KOLEO_WEIGHT", 0], {"dino_global", "dino_local"}),
        (["MODEL.LOSS.DINO_WEIGHT", 0, "MODEL.LOSS.KOLEO_WEIGHT", 0], {"ibot"}),
        (["MODEL.LOSS.DINO_WEIGHT", 0, "MODEL.IBOT_HEAD.SEPARATE", True], {"ibot", "koleo"}),
        (["INPUT.LOCAL_CROPS.NUM", 0], {"dino_global", "ibot", "koleo"}),
        (["SOLVER.AMP.ENABLED", True], {"dino_global", "dino_local", "ibot", "koleo"}),
        (["MODEL.VIT.FFN", "swiglu", "MODEL.VIT.NUM_REGISTER_TOKENS", 2, "INPUT.GLOBAL_CROPS.SIZE_PX", "(8,12)"], None),
        (["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", 0.5, "MODEL.PIXEL_STD", 0.5], None),
    ],
)
def test_variants_run(tiny_cfg: CfgNode, opts: list[Any], terms: set[str] | None) -> None:
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "MODEL.IBOT_HEAD.NUM_PROTOTYPES", 16, *opts])
    trainer = _train(tiny_cfg)
    logged = {name.removeprefix("loss_") for name in trainer.storage.names("loss")} - {"total_loss"}
    assert terms is None or logged == terms
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_results_of_several_datasets_are_kept_apart(tiny_cfg: CfgNode) -> None:
    first, second = "synthetic:num_images=6:num_classes=3:size=12", "synthetic:num_images=9:num_classes=3:size=12"
    tiny_cfg.DATASETS.TEST = (first, second)
    results = SSLTrainer.test(tiny_cfg, SSLTrainer.build_model(tiny_cfg))
    assert results.keys() == {first, second}
    with pytest.raises(ValueError, match="1 evaluators were given for 2 datasets"):
        SSLTrainer.test(tiny_cfg, SSLTrainer.build_model(tiny_cfg), evaluators=[None])  # type: ignore[list-item]


def test_a_model_in_training_mode_is_handed_back_so(tiny_cfg: CfgNode) -> None:
    model = SSLTrainer.build_model(tiny_cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    SSLTrainer.test(tiny_cfg, model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
