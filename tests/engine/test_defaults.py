"""DefaultTrainer's parts, and prediction for one image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import Checkpointer, CheckpointError
from dinoengine.config import CfgNode
from dinoengine.engine import DefaultTrainer, HookBase, SSLTrainer, defaults, hooks
from dinoengine.utils import comm
from dinoengine.utils.logger import setup_logger


def test_hooks_stand_in_the_promised_order(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(
        [
            "TEST.EVAL_PERIOD",
            2,
            "TEST.BEST_METRIC",
            "knn/top1_k1",
            "TEST.EARLY_STOPPING_PATIENCE",
            1,
            "TEST.PRECISE_BN.ENABLED",
            True,
            "LOG.PROFILE_END_ITER",
            2,
        ]
    )
    names = [type(hook).__name__ for hook in SSLTrainer(tiny_cfg)._hooks]
    assert names == [
        "StartupReport",
        "ParamSchedule",
        "EMATeacher",
        "IterationTimer",
        "LRScheduler",
        "NonFiniteGuard",
        "BadImageLog",
        "BadStepRecorder",
        "TorchProfiler",
        "PreciseBN",
        "PeriodicCheckpointer",
        "EvalHook",
        "BestCheckpointer",
        "EarlyStopping",
        "CollapseGuard",
        "PeriodicWriter",
        "StopOnSignal",
    ]


def test_model_loader_and_optimizer_can_be_read_and_set(tiny_cfg: CfgNode) -> None:
    trainer = DefaultTrainer(tiny_cfg)
    for name in ("model", "data_loader", "optimizer"):
        marker = object()
        setattr(trainer, name, marker)
        assert getattr(trainer, name) is marker


def test_each_part_can_be_replaced_by_overriding_its_builder(tiny_cfg: CfgNode) -> None:
    class Mine(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.student.parameters(), lr=1.0)  # type: ignore[union-attr]

    trainer = Mine(tiny_cfg)
    trainer.scheduler.apply(2)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_recipe_moves_to_another_world_size(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
    trainer = DefaultTrainer(tiny_cfg)  # on one process: half the batch, twice the iterations
    assert (trainer.cfg.SOLVER.IMS_PER_BATCH, trainer.max_iter) == (2, 20)
    assert len(next(iter(trainer.data_loader))) == 2
    assert tiny_cfg.SOLVER.IMS_PER_BATCH == 4


def test_unexpected_results_exit_with_1(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS", "(('knn', 'top1_k1', 200.0, 1.0),)"])
    trainer = SSLTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    with pytest.raises(SystemExit) as done:
        trainer.train()
    assert done.value.code == 1
    DefaultTrainer.check_expected_results(tiny_cfg, {"knn": {"top1_k1": 199.5}})
    with pytest.raises(SystemExit):
        DefaultTrainer.check_expected_results(tiny_cfg, {})


def test_a_loader_that_cannot_be_moved_is_said(tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 2
    first = SSLTrainer(tiny_cfg)
    first.resume_or_load(resume=False)
    first.train()
    trainer = SSLTrainer(tiny_cfg)
    trainer.data_loader = [1, 2]
    trainer.resume_or_load(resume=True)
    assert "cannot start at iteration 2" in capsys.readouterr().out


@pytest.fixture
def weights(tiny_cfg: CfgNode, tmp_path: Path) -> str:
    model = SSLTrainer.build_model(tiny_cfg)
    with torch.no_grad():
        for p in model.teacher.parameters():  # type: ignore[union-attr]
            p.add_(0.01)
    return Checkpointer(model, str(tmp_path / "weights")).save("w")


def test_weights_start_a_run_at_iteration_0(tiny_cfg: CfgNode, weights: str) -> None:
    tiny_cfg.MODEL.WEIGHTS = weights
    trainer = SSLTrainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    saved = torch.load(weights, weights_only=True)["model"]
    assert all(torch.equal(saved[k], v) for k, v in trainer.bare_model.state_dict().items())


def test_whether_a_run_is_resumed_is_decided_by_rank_0(
    tiny_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another rank the folder is empty, as on a machine without the shared file system."""
    trainer = SSLTrainer(tiny_cfg)
    forked: list[str] = []
    monkeypatch.setattr(defaults, "fork_run", lambda trainer, source: forked.append(source) or 0)
    monkeypatch.setattr(comm, "on_main_process", lambda work: work() if "clean_up" in work.__name__ else True)
    monkeypatch.setattr(comm, "broadcast_object", lambda seen: ("model_0000004.pth", ["model_0000004.pth"]))
    with pytest.raises(CheckpointError, match=r"model_0000004\.pth is not there(.|\n)*a file system that they share"):
        trainer.resume_or_load(resume=True, fork_from="another")
    assert forked == []


def test_a_run_whose_checkpoints_are_gone_is_said_to_start_again(
    tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = SSLTrainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert "no checkpoint: it ended before" not in capsys.readouterr().out
    Path(tiny_cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    Path(tiny_cfg.OUTPUT_DIR, "metrics.json").write_text('{"iteration": 7}\n')
    trainer.resume_or_load(resume=True)
    assert "holds a run (metrics.json) and no checkpoint: it ended before the first one" in capsys.readouterr().out
    assert trainer.start_iter == 0


def test_a_training_set_of_another_size_is_said(tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    state = SSLTrainer(tiny_cfg).state_dict()
    tiny_cfg.DATASETS.TRAIN = ("synthetic:num_images=20:num_classes=3:size=12",)
    SSLTrainer(tiny_cfg).load_state_dict(state)
    assert "had 24 images when this checkpoint was written and has 20 now" in capsys.readouterr().out


def test_a_new_run_may_take_weights_and_moments(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 3
    first = SSLTrainer(tiny_cfg)
    first.train()
    tiny_cfg.MODEL.WEIGHTS = str(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth")
    tiny_cfg.MODEL.WEIGHTS_WITH_OPTIMIZER = True
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "second")
    second = SSLTrainer(tiny_cfg)
    second.resume_or_load(resume=False)
    assert second.start_iter == 0
    for mine, theirs in zip(second.optimizer.state.values(), first.optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
        assert mine["step"] == 3
    for mine, theirs in zip(second.model.state_dict().values(), first.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_moments_that_are_not_there_are_an_error(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    trainer = SSLTrainer(tiny_cfg)
    Checkpointer(trainer.bare_model, str(tmp_path)).save("weights")
    tiny_cfg.merge_from_list(["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "MODEL.WEIGHTS_WITH_OPTIMIZER", True])
    with pytest.raises(ValueError, match="holds no optimizer state; set MODEL.WEIGHTS_WITH_OPTIMIZER False"):
        SSLTrainer(tiny_cfg).resume_or_load(resume=False)


def test_an_output_dir_that_vanishes_ends_no_training_and_changes_no_weight(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.merge_from_list(["DATASETS.TEST", "()", "LOG.TENSORBOARD", "True", "SOLVER.CHECKPOINT_PERIOD", "2"])

    def weights(cfg: CfgNode, *more: HookBase) -> dict[str, torch.Tensor]:
        setup_logger(cfg.OUTPUT_DIR)
        trainer = SSLTrainer(cfg)
        trainer.register_hooks(more)
        trainer.train()
        return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]

    whole = weights(tiny_cfg)
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "vanishing")
    remove = hooks.CallbackHook(before_step=lambda t: shutil.rmtree(tiny_cfg.OUTPUT_DIR) if t.iter == 5 else None)
    left = weights(tiny_cfg, remove)
    assert all(torch.equal(left[name], whole[name]) for name in whole)
    rows = [
        json.loads(line)["iteration"] for line in (tmp_path / "vanishing" / "metrics.json").read_text().splitlines()
    ]
    assert rows[-5:] == [5, 6, 7, 8, 9]
    assert "Saved checkpoint" in (tmp_path / "vanishing" / "log.txt").read_text()
