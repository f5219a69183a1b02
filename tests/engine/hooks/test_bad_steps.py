"""The black box of steps that are not finite."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import Checkpointer, CheckpointWriteError
from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.engine import SimpleTrainer, SSLTrainer, hooks
from dinoengine.engine.hooks.bad_steps import images_at, positions_of
from dinoengine.engine.run_lock import RunInUseError
from tests.engine.toys import OverflowingScaler, ToyData, ToyModel, toy_trainer


def _recorded(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "bad_steps").glob("*.json"))}


def _toy(folder: Path, bad: tuple[int, ...], max_skips: int, max_records: int = 20, **options: Any) -> SimpleTrainer:
    trainer = toy_trainer(ToyData(bad_iters=bad), seed=3, **options)
    checkpointer = Checkpointer(trainer.model, str(folder), trainer=trainer)
    trainer.register_hooks([hooks.NonFiniteGuard(max_skips), hooks.BadStepRecorder(checkpointer, max_records)])
    return trainer


def test_a_finite_run_leaves_nothing(tmp_path: Path) -> None:
    _toy(tmp_path, (), 0).train(0, 3)
    assert not list(tmp_path.iterdir())


def test_the_record_of_a_step_that_stops_the_run(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, (2,), 0, clip_grad_norm=1.0)
    with pytest.raises(FloatingPointError, match="iteration 2"):
        trainer.train(0, 5)
    records = _recorded(tmp_path)
    assert list(records) == ["0000002_rank0.json"]
    record = records["0000002_rank0.json"]
    assert record["losses"] == {"loss_square": "nan", "loss_abs": "nan", "total_loss": "nan"}
    assert record["gradient_norms"] == {"model": "nan"}
    assert record["non_finite_gradients"] == ["linear.weight", "linear.bias"]
    assert (record["num_parameters"], record["num_non_finite"]) == (2, 2)
    assert record["lr"] == {"min": 0.1, "max": 0.1}
    assert record["skipped"] is False
    assert record["loss_is_finite"] is False
    assert record["state_before"] == "model_before_0000002.pth"
    assert record["seed"] == 3
    assert not (tmp_path / "last_checkpoint").exists()


def test_the_saved_state_is_that_before_the_step(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        _toy(tmp_path, (2,), 0).train(0, 5)
    before = toy_trainer(seed=3)
    before.train(0, 2)
    other = toy_trainer(seed=3)
    path = tmp_path / "bad_steps" / "model_before_0000002.pth"
    saved = Checkpointer(other.model, str(tmp_path), trainer=other).load(str(path))
    assert saved["iteration"] == 1
    assert torch.equal(other.model.linear.weight, before.model.linear.weight)  # type: ignore[union-attr]
    moments, expected = other.optimizer.state_dict()["state"], before.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i]["momentum_buffer"], expected[i]["momentum_buffer"]) for i in expected)


def test_a_gradient_alone_is_named_and_the_finite_ones_are_as_before_clipping(tmp_path: Path) -> None:
    trainer = _toy(tmp_path, (), 1, clip_grad_norm=1e-3)
    trainer.model.linear.bias.register_hook(lambda grad: grad * torch.inf)  # type: ignore[union-attr]
    weights: list[torch.Tensor] = []
    trainer.register_hooks(
        [hooks.CallbackHook(before_optimizer_step=lambda t: weights.append(t.model.linear.weight.grad.abs().max()))]
    )
    trainer.train(0, 1)
    record = _recorded(tmp_path)["0000000_rank0.json"]
    assert record["non_finite_gradients"] == ["linear.bias"]
    assert record["loss_is_finite"] is True
    alone = toy_trainer()  # unclipped
    alone.train(0, 1)
    expected = alone.model.linear.weight.grad.abs().max().item()  # type: ignore[union-attr]
    assert record["largest_finite_gradients"] == {"linear.weight": pytest.approx(expected)}
    assert expected > 1e-2


def test_skips_are_recorded_up_to_a_bound_with_one_state_and_the_stop_always(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _toy(tmp_path, (1, 2, 3, 4, 6), 4, max_records=2)
    with pytest.raises(FloatingPointError, match="iteration 6"):
        trainer.train(0, 9)
    assert list(_recorded(tmp_path)) == [f"000000{i}_rank0.json" for i in (1, 2, 6)]
    assert sorted(p.name for p in (tmp_path / "bad_steps").glob("*.pth")) == [
        "model_before_0000001.pth",
        "model_before_0000006.pth",
    ]
    assert "5 steps were not finite; the first 2 are recorded" in caplog.text


def test_overflows_of_fp16_are_not_recorded(tmp_path: Path) -> None:
    _toy(tmp_path, (), 0, grad_scaler=OverflowingScaler()).train(0, 3)
    assert not list(tmp_path.iterdir())


def test_a_black_box_that_cannot_be_written_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad_steps").write_text("a file where the folder should be")
    with pytest.raises(FloatingPointError, match="iteration 1"):
        _toy(tmp_path, (1,), 0).train(0, 3)
    assert "The state before the bad step cannot be saved" in caplog.text
    assert "The record of the bad step cannot be written" in caplog.text


@pytest.mark.parametrize("max_skips", [0, 1])
def test_a_checkpoint_that_was_lost_before_a_bad_step_hides_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, max_skips: int
) -> None:
    """A run that stops says why; one that would go on has the lost checkpoint to stop for."""
    trainer = toy_trainer(ToyData(bad_iters=(1,)), seed=3)
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks(
        [
            hooks.NonFiniteGuard(max_skips),
            hooks.BadStepRecorder(checkpointer),
            hooks.PeriodicCheckpointer(checkpointer, 1, background=True),
        ]
    )

    def full(data: dict[str, Any], file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointWriteError if max_skips else FloatingPointError):
        trainer.train(0, 3)
    assert _recorded(tmp_path)["0000001_rank0.json"]["state_before"] == ""
    assert ("written in the background is lost" in caplog.text) == (not max_skips)


def test_an_output_dir_that_another_run_has_taken_is_left_alone(tmp_path: Path) -> None:
    trainer = toy_trainer(ToyData(bad_iters=(1,)), seed=3)
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([hooks.NonFiniteGuard(1), hooks.BadStepRecorder(checkpointer)])

    def refuse() -> None:
        raise RunInUseError("taken")

    checkpointer.before_save = refuse
    with pytest.raises(RunInUseError):
        trainer.train(0, 3)
    assert not list(tmp_path.iterdir())


class _Counting(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.total += x.sum()
        return super().forward(x)


def test_an_overflow_of_fp16_gradients_leaves_what_the_forward_pass_moved() -> None:
    """Its losses were finite: the centres have seen the batch."""
    model = _Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, ToyData(), optimizer, grad_scaler=OverflowingScaler())  # type: ignore[arg-type]
    trainer.train(0, 2)
    assert model.total.item() == pytest.approx(sum(x.sum().item() for _, x in zip(range(2), ToyData(), strict=False)))


def test_buffers_of_a_skipped_step_are_those_before_it() -> None:
    model = _Counting()
    trainer = SimpleTrainer(model, ToyData(bad_iters=(1,)), torch.optim.SGD(model.parameters(), lr=0.1))
    seen: list[float] = []
    trainer.register_hooks(
        [hooks.NonFiniteGuard(1), hooks.CallbackHook(after_step=lambda t: seen.append(t.model.total.item()))]
    )
    trainer.train(0, 3)
    assert seen[1] == seen[0]
    assert seen[2] not in (seen[0], seen[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_positions_and_images_are_those_of_the_batch(tiny_cfg: CfgNode, rank: int) -> None:
    loader = build_train_loader(tiny_cfg, 5, rank=rank, world_size=2)
    positions = positions_of(loader, 5)
    assert next(iter(loader)).positions.tolist() == positions == [20 + 2 * rank, 21 + 2 * rank]
    stream = loader.dataset
    expected = [stream.dataset.describe(stream.sampler.index_at(p)) for p in positions]
    assert images_at(loader, positions) == expected
    assert images_at(loader, [0]) == images_at(loader, [0])
    assert positions_of([1, 2], 5) == []


def test_a_whole_trainer_records_its_images(tiny_cfg: CfgNode) -> None:
    tiny_cfg.DATASETS.TEST = ()
    trainer = SSLTrainer(tiny_cfg)
    trainer.register_hooks([hooks.CallbackHook(before_step=lambda t: _poison(t) if t.iter == 1 else None)])
    with pytest.raises(FloatingPointError):
        trainer.train()
    record = _recorded(Path(tiny_cfg.OUTPUT_DIR))["0000001_rank0.json"]
    assert record["positions"] == [4, 5, 6, 7]
    assert len(record["images"]) == 4
    assert record["teacher_temp"] == pytest.approx(trainer.bare_model.teacher_temp)
    assert "student.backbone.norm.weight" in record["non_finite_gradients"]


def _poison(trainer: SSLTrainer) -> None:
    with torch.no_grad():
        trainer.bare_model.student["backbone"].norm.weight.fill_(torch.nan)  # type: ignore[index]


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "bad_steps").mkdir()
    (tmp_path / "bad_steps" / ".model_before_0000001.pth.0a1b2c3d.tmp").touch()
    (tmp_path / "bad_steps" / "0000001_rank0.json").touch()
    _toy(tmp_path, (), 0).train(0, 1)
    assert os.listdir(tmp_path / "bad_steps") == ["0000001_rank0.json"]
