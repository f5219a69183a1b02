"""Several processes: the same function as one, the same decisions on each."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dinoengine.checkpoint import Checkpointer, CheckpointWriteError
from dinoengine.config import CfgNode, get_cfg
from dinoengine.engine import SSLTrainer, create_ddp_model, hooks, launch, unwrap_model
from dinoengine.utils import comm
from tests.conftest import TINY
from tests.engine.toys import ToyData, ToyModel, toy_trainer

VARIANTS = {
    "centering": [],
    "sinkhorn": ["MODEL.LOSS.CENTERING", "sinkhorn_knopp", "MODEL.IBOT_HEAD.SEPARATE", True],
    "dino only": ["MODEL.LOSS.IBOT_WEIGHT", 0],
    "micro-batches": ["SOLVER.NUM_MICRO_BATCHES", 2, "MODEL.LOSS.KOLEO_GROUP_SIZE", 2],
}


def _cfg(folder: str, variant: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([word for key, value in TINY.items() for word in (key, str(value))])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 4, "MODEL.IBOT_HEAD.NUM_PROTOTYPES", 16])
    cfg.merge_from_list(VARIANTS[variant])
    cfg.OUTPUT_DIR = os.path.join(folder, variant)
    return cfg


def _run(folder: str, variant: str) -> dict[str, Any]:
    trainer = SSLTrainer(_cfg(folder, variant))
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    return {
        "losses": [v for v, _ in trainer.storage.history("total_loss").values()],
        "weights": trainer.bare_model.state_dict(),
        "results": results,
        "last_iteration": trainer.iter,
    }


class _RankData(ToyData):
    """One rank's rows of the batches of a single process; NaN on the last rank at ``bad_iters``."""

    def __iter__(self) -> Any:
        world, rank = comm.get_world_size(), comm.get_rank()
        for iteration, batch in enumerate(ToyData(self.batch_size)):
            part = batch.chunk(world)[rank]
            yield part * torch.nan if iteration in self.bad_iters and rank == world - 1 else part


def _bad_step_on_one_rank() -> dict[str, Any]:
    trainer = toy_trainer(_RankData(bad_iters=(2,)))
    trainer.model = create_ddp_model(trainer.model)
    before: list[torch.Tensor] = []
    trainer.register_hooks(
        [hooks.CallbackHook(before_step=lambda t: before.append(unwrap_model(t.model).linear.weight.detach().clone()))]
    )
    try:
        trainer.train(0, 5)
        message = "trained on"
    except FloatingPointError as error:
        message = str(error)
    weight = unwrap_model(trainer.model).linear.weight.detach()  # type: ignore[union-attr]
    return {"message": message, "unchanged": torch.equal(weight, before[-1])}


def _bad_step_without_a_black_box(folder: str) -> dict[str, Any]:
    """A file of rank 0 is where the folder should be: what the step before had is lost for all, and the run goes on."""
    folder = os.path.join(folder, "no black box")
    if comm.is_main_process():
        os.makedirs(folder)
        with open(os.path.join(folder, "bad_steps"), "w", encoding="utf-8"):
            pass
    trainer = toy_trainer(_RankData(bad_iters=(1,)))
    trainer.model = create_ddp_model(trainer.model)
    checkpointer = Checkpointer(unwrap_model(trainer.model), folder, trainer=trainer)
    trainer.register_hooks([hooks.NonFiniteGuard(1), hooks.BadStepRecorder(checkpointer)])
    trainer.train(0, 3)
    return {"iter": trainer.iter, "files": sorted(os.listdir(folder))}


def _gradients(num_micro_batches: int, **ddp_options: Any) -> torch.Tensor:
    """Gradients of the first step, and how often they were reduced."""
    trainer = toy_trainer(_RankData(), num_micro_batches=num_micro_batches)
    trainer.model = create_ddp_model(trainer.model, **ddp_options)
    trainer.train(0, 1)
    return unwrap_model(trainer.model).linear.weight.grad.clone()  # type: ignore[union-attr]


def _metrics() -> dict[str, Any]:
    trainer = toy_trainer(_RankData(), gather_metric_period=2)
    trainer.model = create_ddp_model(trainer.model)
    trainer.train(0, 3)
    return {name: h.values() for name, h in trainer.storage.histories().items()}


def _saving(folder: str) -> dict[str, Any]:
    """A disk that is full in iterations 3 and 7, clocks that disagree, files in the background, a best one: what this rank
    has seen of it, and how the run ends."""
    folder = os.path.join(folder, "saving")
    clock = itertools.count(0, 0 if comm.get_rank() else 60)  # a minute passes between two looks, or none
    save, full_at = torch.save, {3, 7}

    def write(data: Any, file: Any) -> None:
        if data["iteration"] in full_at:
            raise OSError(28, "No space left on device")
        save(data, file)

    trainer = toy_trainer()
    trainer.model = create_ddp_model(trainer.model)
    checkpointer = Checkpointer(unwrap_model(trainer.model), folder, on_error="continue", trainer=trainer)
    put = hooks.CallbackHook(after_step=lambda t: t.storage.put_scalar("m", t.iter // 3, role="eval"))
    periodic = hooks.PeriodicCheckpointer(
        checkpointer, 4, minutes=1, check_period=2, background=True, clock=lambda: float(next(clock))
    )
    trainer.register_hooks([put, periodic, hooks.BestCheckpointer(checkpointer, "m")])
    torch.save = write  # type: ignore[assignment]
    try:
        trainer.train(0, 8)
        end = "saved"
    except CheckpointWriteError as error:
        end = str(error)
    finally:
        torch.save = save
    return {"num_failed": checkpointer.num_failed, "end": end, "files": sorted(os.listdir(folder))}


def _work(folder: str) -> None:
    """Everything that needs two processes, in one go: starting processes is what costs."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {variant: _run(folder, variant) for variant in VARIANTS}
    report["bad step"] = _bad_step_on_one_rank()
    report["no black box"] = _bad_step_without_a_black_box(folder)
    report["gradients"] = {n: _gradients(n) for n in (1, 2)}
    report["fp16 gradients"] = _gradients(1, fp16_compression=True)
    report["metrics"] = _metrics()
    report["saving"] = _saving(folder)
    report["wrapped"] = isinstance(create_ddp_model(ToyModel()), DistributedDataParallel)
    torch.save(report, os.path.join(folder, f"rank{comm.get_rank()}.pt"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("two"))
    assert launch(_work, 2, args=(folder,), device="cpu") is None
    return [torch.load(os.path.join(folder, f"rank{r}.pt"), weights_only=False) for r in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_what_one_would(two_ranks: list[dict[str, Any]], tmp_path: Path, variant: str) -> None:
    one = _run(str(tmp_path), variant)
    first, second = (rank[variant] for rank in two_ranks)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=2e-4)
    for name, value in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        # Adam turns rounding of tiny gradients into steps of the size of the LR, 0.01: compare what it cannot blur.
        if "center" in name:
            torch.testing.assert_close(first["weights"][name], value, rtol=1e-2, atol=1e-3)
    assert first["results"] == second["results"]


@pytest.mark.slow
def test_a_bad_loss_on_one_rank_stops_both_before_the_optimizer(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert "not finite in iteration 2" in rank["bad step"]["message"]
        assert rank["bad step"]["unchanged"]


@pytest.mark.slow
def test_a_black_box_that_one_rank_cannot_write_is_left_out_by_all(two_ranks: list[dict[str, Any]]) -> None:
    assert [report["no black box"] for report in two_ranks] == 2 * [{"iter": 3, "files": ["bad_steps"]}]


def test_processes_agree_on_what_is_saved_and_on_what_fails(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["saving"] for rank in two_ranks)
    assert first == second
    # 3 and 7 by the period, in the background, and the best of 3 find no room; 1 and 5 are by the clock of rank 0.
    assert first["num_failed"] == 3
    assert "model_final.pth could not be written: No space left on device" in first["end"]
    assert "the last good checkpoint is model_0000005.pth" in first["end"]
    assert first["files"] == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_0000005.pth",
        "model_best.json",
        "model_best.pth",
    ]


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_batch_also_in_parts(two_ranks: list[dict[str, Any]]) -> None:
    trainer = toy_trainer()
    trainer.train(0, 1)
    expected = trainer.model.linear.weight.grad  # type: ignore[union-attr]
    for rank in two_ranks:
        for gradients in rank["gradients"].values():
            torch.testing.assert_close(gradients, expected)
        torch.testing.assert_close(rank["fp16 gradients"], expected, rtol=2e-3, atol=1e-3)
        assert not torch.equal(rank["fp16 gradients"], rank["gradients"][1])


@pytest.mark.slow
def test_logged_losses_are_means_over_ranks_and_data_time_the_largest(two_ranks: list[dict[str, Any]]) -> None:
    trainer = toy_trainer()
    trainer.train(0, 3)
    first, second = (rank["metrics"] for rank in two_ranks)
    assert first == second
    assert [v for v, _ in first["total_loss"]] == pytest.approx(
        [v for v, _ in trainer.storage.history("total_loss").values()], rel=1e-5
    )
    assert [i for _, i in first["data_time"]] == [0, 1, 2]


@pytest.mark.slow
def test_only_rank_0_writes(two_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    assert all(rank["wrapped"] for rank in two_ranks)
    cfg = _cfg(str(tmp_path), "centering")
    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    rows = [json.loads(line) for line in Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]


def test_a_single_process_is_not_wrapped() -> None:
    model = ToyModel()
    assert create_ddp_model(model) is model
    assert unwrap_model(model) is model


def test_compiled_models_are_unwrapped() -> None:
    class Compiled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = ToyModel()

    wrapped = Compiled()
    assert unwrap_model(wrapped) is wrapped._orig_mod
