"""The black box: what is kept of a step whose loss or gradients are not finite."""

from __future__ import annotations

import json
import logging
import math
import os
from typing import Any

import torch

from dinoengine.checkpoint import Checkpointer
from dinoengine.checkpoint.writing import CheckpointWriteError
from dinoengine.engine.parallel import unwrap_model
from dinoengine.engine.run_lock import RunInUseError
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.utils import comm
from dinoengine.utils.env import step_seed
from dinoengine.utils.file_writing import atomic_write, remove_stale_temporaries

logger = logging.getLogger(__name__)

FOLDER = "bad_steps"
_NUM_NAMES = 50
_NUM_LARGEST = 10


class BadStepRecorder(HookBase):
    """Writes ``bad_steps/<iteration>_rank<r>.json`` on every rank, and the state before the step, to be replayed.

    A step is bad on all ranks together, so every rank writes its part of it. Overflows that the fp16 scaler handles are
    not recorded. The state (``bad_steps/model_before_<iteration>.pth``, a full checkpoint that ``last_checkpoint`` does not
    name) is saved for the first step that is skipped and for the one that stops the run. Register it behind the
    NonFiniteGuard, which decides, on all processes. A black box that cannot be written is a warning.
    """

    trainer: SimpleTrainer
    sees_weights_before_step = False

    def __init__(self, checkpointer: Checkpointer, max_records: int = 20) -> None:
        """
        Args:
            checkpointer: of the run; ``bad_steps`` is made in its folder.
            max_records: bad steps recorded after each start of the run; later ones are counted, but the one that stops
                the run is always recorded.
        """
        self.checkpointer = checkpointer
        self.max_records = max_records
        self.num_bad = 0
        self._has_saved_a_skip = False

    def before_train(self) -> None:
        if comm.is_main_process() and os.path.isdir(self._folder):
            remove_stale_temporaries(self._folder)  # of a process that was killed while it wrote here

    def before_optimizer_step(self) -> None:
        trainer = self.trainer
        if trainer.step_is_finite or trainer.is_fp16_overflow:
            return
        self.num_bad += 1
        is_skipped = trainer.skip_optimizer_step
        if is_skipped and self.num_bad > self.max_records:
            return
        record = describe_step(trainer)  # before metrics are flushed, which takes the images that were replaced away
        record |= {"skipped": is_skipped, "state_before": ""}
        if not (is_skipped and self._has_saved_a_skip):
            self._has_saved_a_skip = True
            try:
                self._finish_earlier_save(is_skipped)
            except CheckpointWriteError:
                self._write(record)
                raise
            record["state_before"] = self._save_state()
        self._write(record)

    def after_train(self) -> None:
        if self.num_bad > self.max_records:
            logger.warning(
                "%d steps were not finite; the first %d are recorded in %s.",
                self.num_bad,
                self.max_records,
                self._folder,
            )

    @property
    def _folder(self) -> str:
        return os.path.join(self.checkpointer.save_dir, FOLDER)

    def _finish_earlier_save(self, goes_on: bool) -> None:
        # An error of the last checkpoint is none of this one's: a run that goes on has it to face, of one that stops the
        # bad step is the reason.
        if goes_on:
            self.checkpointer.wait()
        else:
            self.checkpointer.settle()

    def _save_state(self) -> str:
        """Weights, moments and buffers are those before the step. The same on all ranks, as saving is collective.

        Nothing here is done by one rank alone: the others would go on to a collective without it.
        """
        name = state_name(self.trainer.iter)
        try:
            self.trainer.flush_metrics()
            path = self.checkpointer.save(f"{FOLDER}/{name}", tag_last=False, iteration=self.trainer.iter - 1)
        except RunInUseError:
            raise
        except Exception as error:  # whatever it is, the bad step is what the run must report
            logger.warning("The state before the bad step cannot be saved: %s", error)
            return ""
        return os.path.basename(path)

    def _write(self, record: dict[str, Any]) -> None:
        path = os.path.join(self._folder, record_name(record["iteration"], record["rank"]))
        try:
            os.makedirs(self._folder, exist_ok=True)
            with atomic_write(path, "w") as file:
                json.dump(record, file, indent=1, allow_nan=False)
        except OSError as error:
            logger.warning("The record of the bad step cannot be written: %s", error)
        else:
            logger.warning("The step is recorded in %s; tools/replay_step.py runs it again.", path)


def state_name(iteration: int) -> str:
    """Name of the checkpoint of the state before a step, without ``.pth``."""
    return f"model_before_{iteration:07d}"


def record_name(iteration: int, rank: int) -> str:
    return f"{iteration:07d}_rank{rank}.json"


def describe_step(trainer: SimpleTrainer) -> dict[str, Any]:
    """What this rank knows about its step, as JSON: numbers that are not finite are the texts "nan", "inf", "-inf".

    Call it after the gradients are complete. ``loss_is_finite`` is of this rank alone: where it is False the rank has
    caused the trouble. Gradients are averages over the ranks, so they do not tell.
    """
    rank, model = comm.get_rank(), unwrap_model(trainer.model)
    positions = positions_of(trainer.data_loader, trainer.iter)
    losses = {name: value.item() for name, value in trainer.last_losses.items()}
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    return {
        "iteration": trainer.iter,
        "rank": rank,
        "world_size": comm.get_world_size(),
        "positions": positions,
        "images": images_at(trainer.data_loader, positions),
        # Those of them that could not be used; other images took their places.
        "replaced": [bad._asdict() for iteration, bad in trainer.bad_images if iteration == trainer.iter],
        "losses": {name: _number(value) for name, value in losses.items()},
        "loss_is_finite": math.isfinite(losses["total_loss"]),
        "loss_is_finite_on_all_ranks": trainer.loss_is_finite,
        "gradient_norms": {name: _number(norm.item()) for name, norm in trainer.grad_norms.items()},
        **_gradient_summary(model),
        "lr": {"min": min(rates), "max": max(rates)},
        "teacher_temp": getattr(model, "teacher_temp", None),
        "loss_scale": None if trainer.grad_scaler is None else trainer.grad_scaler.get_scale(),
        "precision": trainer.precision,
        "num_micro_batches": trainer.num_micro_batches,
        "seed": trainer.seed,
        "step_seed": None if trainer.seed is None else step_seed(trainer.seed, trainer.iter, rank),
    }


def positions_of(data_loader: Any, iteration: int) -> list[int]:
    """Stream positions of this rank's batch; empty for a loader that is not of ``build_train_loader``."""
    sampler: Any = getattr(data_loader, "batch_sampler", None)
    return sampler.positions_at(iteration) if hasattr(sampler, "positions_at") else []


def images_at(data_loader: Any, positions: list[int]) -> list[str]:
    """Where the images at these positions of the stream come from."""
    stream: Any = getattr(data_loader, "dataset", None)
    stream = getattr(stream, "stream", stream)  # of a classifier's loader
    return [stream.dataset.describe(stream.sampler.index_at(position)) for position in positions]


@torch.no_grad()
def _gradient_summary(model: torch.nn.Module) -> dict[str, Any]:
    """Names of the parameters with a NaN or infinity in their gradient, and the largest of the finite gradients."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    peaks = torch.stack([_peak(g.detach()) for g in gradients.values()]).tolist() if gradients else []
    bad = [name for name, peak in zip(gradients, peaks, strict=True) if not math.isfinite(peak)]
    finite = sorted(
        ((peak, name) for name, peak in zip(gradients, peaks, strict=True) if math.isfinite(peak)), reverse=True
    )
    return {
        "num_parameters": len(gradients),
        "num_non_finite": len(bad),
        "non_finite_gradients": bad[:_NUM_NAMES],
        "largest_finite_gradients": {name: peak for peak, name in finite[:_NUM_LARGEST]},
    }


def _peak(gradient: torch.Tensor) -> torch.Tensor:
    """The largest magnitude; of a sharded gradient a collective operation (this process may have no part of it)."""
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole.abs().max().float()


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
