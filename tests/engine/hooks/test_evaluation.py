"""When evaluations run, and what becomes of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.data import build_test_loader
from dinoengine.engine import hooks
from dinoengine.modeling import build_model
from dinoengine.structures import SSLBatch
from tests.engine.toys import IdleTrainer


@pytest.mark.parametrize(
    ("max_iter", "period", "expected"), [(30, 15, 2), (31, 15, 3), (20, 0, 1), (10, 1, 10), (3, 5, 1)]
)
def test_how_often(max_iter: int, period: int, expected: int) -> None:
    at: list[int] = []
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.EvalHook(period, lambda: at.append(trainer.iter) or {})])  # type: ignore[func-returns-value]
    trainer.train(0, max_iter)
    assert len(at) == expected
    assert at[-1] == max_iter


def test_the_last_one_can_be_left_out() -> None:
    at: list[int] = []
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.EvalHook(2, lambda: at.append(trainer.iter) or {}, eval_after_train=False)])  # type: ignore[func-returns-value]
    trainer.train(0, 6)
    assert at == [1, 3]


def test_results_are_flattened_unsmoothed_and_logged_at_their_iteration() -> None:
    values = iter([1.0, 9.0])
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.EvalHook(2, lambda: {"knn": {"top1": next(values)}})])
    trainer.train(0, 4)
    assert trainer.storage.history("knn/top1").values() == [(1.0, 1), (9.0, 4)]
    assert trainer.storage.latest_with_smoothing_hint(20)["knn/top1"] == (9.0, 4)
    assert trainer.storage.role("knn/top1") == "eval"


def test_a_result_that_is_no_number_is_named() -> None:
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.EvalHook(1, lambda: {"knn": {"top1": "high"}})])
    with pytest.raises(ValueError, match="got 'knn/top1' = 'high' \\(str\\)"):
        trainer.train(0, 2)


def test_knn_hook_measures_the_model_that_is_trained(tiny_cfg: Any) -> None:
    model = build_model(tiny_cfg)
    bank = build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TRAIN)
    hook = hooks.KNNEvalHook(
        2, model.feature_model(), bank, build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST), ks=(1, 3)
    )
    trainer = IdleTrainer()
    trainer.register_hooks([hook])
    trainer.train(0, 3)
    history = trainer.storage.history("knn/top1_k1").values()
    assert [i for _, i in history] == [1, 3]
    assert all(0 <= v <= 100 for v, _ in history)
    assert model.training
    assert not model.teacher.training


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_an_evaluation_at_the_start_is_iteration_0_and_not_repeated_by_a_resume() -> None:
    for start, expected in ((0, [0, 4]), (2, [4])):
        trainer = IdleTrainer()
        trainer.register_hooks([hooks.EvalHook(0, lambda: {"m": 1.0}, eval_at_start=True)])
        trainer.train(start, 4)
        assert [i for _, i in trainer.storage.history("m").values()] == expected


def test_precise_bn_averages_training_batches() -> None:
    batches = [torch.randn(64, 2, generator=torch.Generator().manual_seed(i)) * 3 + 5 for i in range(4)]
    model = _Normed().eval()  # as a teacher is
    trainer = IdleTrainer()
    loader = [SSLBatch(crops, None, None, torch.arange(32)) for crops in batches]
    trainer.register_hooks([hooks.PreciseBN(0, model, loader, num_iter=4)])
    trainer.train(0, 2)
    assert not model.norm.training
    torch.testing.assert_close(model.norm.running_mean, torch.cat(batches).mean(0), rtol=1e-4, atol=1e-4)
    assert model.norm.momentum == 0.1


def test_precise_bn_leaves_a_model_without_batch_norm_alone() -> None:
    def never() -> Any:
        raise AssertionError("no batch is needed")

    trainer = IdleTrainer()
    trainer.register_hooks([hooks.PreciseBN(1, nn.Linear(1, 1), iter(never, 0), num_iter=1)])
    trainer.train(0, 2)


def test_nothing_is_written_for_an_empty_result(tmp_path: Path) -> None:
    trainer = IdleTrainer()
    trainer.register_hooks([hooks.EvalHook(1, dict)])
    trainer.train(0, 2)
    assert trainer.storage.latest() == {}
