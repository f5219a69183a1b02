"""Run one step of a run again and tell where its first value that is not finite appears."""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint import periodic_checkpoints
from dinoengine.checkpoint.resuming import endings_of
from dinoengine.checkpoint.sharded import is_checkpoint
from dinoengine.config import CfgNode, read_cfg, validate
from dinoengine.engine import hooks
from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.classifier_trainer import trainer_class_of
from dinoengine.engine.config_loading import resolve_device
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.hooks.bad_steps import FOLDER, describe_step, positions_of, record_name, state_name
from dinoengine.engine.resuming import CONFIG_FILE
from dinoengine.engine.setup import default_setup
from dinoengine.engine.train_loop import HookBase
from dinoengine.modeling.backbone import Backbone
from dinoengine.structures import BackboneOutput, ImageBatch, PickedTokens, SSLBatch
from dinoengine.utils import comm

logger = logging.getLogger(__name__)

# What changes weights or what a step computes; the rest saves, evaluates and writes.
_STEP_HOOKS = (hooks.LRScheduler, hooks.ParamSchedule, hooks.EMATeacher, hooks.NonFiniteGuard)
_ROW_PER_CROP = (BackboneOutput, SSLBatch, ImageBatch)


@dataclass
class Replay:
    """A step that was run again, as one rank saw it.

    Attributes:
        step: as ``describe_step`` tells it.
        is_finite: loss and gradients on all ranks.
        first_module: the first module, in the order they were computed, with an output that is not finite; "batch" if the
            batch was not, empty if none.
        images: numbers within this rank's batch of the images whose crops or features are not finite, of the first
            micro-batch that has some; empty if the trouble begins behind the backbone.
        first_gradient: the first parameter of the backward pass with a gradient that is not finite, on this rank.
    """

    step: dict[str, Any]
    is_finite: bool = True
    first_module: str = ""
    images: list[int] = field(default_factory=list)
    first_gradient: str = ""


def recorded_steps(run_dir: str) -> list[int]:
    """Iterations in ``bad_steps``, in order."""
    names = (os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(run_dir), FOLDER, "*_rank*.json")))
    return sorted({int(name.split("_rank")[0]) for name in names})


def read_records(run_dir: str, iteration: int) -> list[dict[str, Any]]:
    """The records of a step, by rank; empty if there are none."""
    records: list[dict[str, Any]] = []
    while os.path.exists(path := os.path.join(run_dir, FOLDER, record_name(iteration, len(records)))):
        with open(path, encoding="utf-8") as file:
            records.append(json.load(file))
    return records


def missing_record(run_dir: str, iteration: int) -> str:
    """What is said of a step that has no record: which have one. Empty if it has."""
    known = recorded_steps(run_dir)
    if iteration in known:
        return ""
    there = f"of {', '.join(map(str, known))} there are" if known else f"{FOLDER} has none"
    return f"There is no record of iteration {iteration} to compare with; {there}."


def state_before(run_dir: str, iteration: int) -> str:
    """The file to start from: the state right before the step, else the newest checkpoint before it.

    Returns:
        Its path; empty: the run starts from its beginning.
    """
    for exact in endings_of(os.path.join(run_dir, FOLDER, state_name(iteration))):
        if is_checkpoint(exact):
            return exact
    earlier = [path for number, path in periodic_checkpoints(run_dir).items() if number < iteration]
    return earlier[-1] if earlier else ""


def replay_config(run_dir: str, overrides: list[str], num_gpus: int | None, scratch: str) -> tuple[CfgNode, int]:
    """The config of a run, for a replay that writes to ``scratch`` instead, and the number of processes.

    Raises:
        ConfigError: if it does not fit this machine or this number of processes.
        FileNotFoundError: if the folder holds no run.
    """
    path = os.path.join(run_dir, CONFIG_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not there; --run takes the OUTPUT_DIR of a run.")
    cfg = read_cfg(path, overrides)
    cfg.OUTPUT_DIR = scratch
    cfg.DATASETS.TEST = ()  # nothing is evaluated
    cfg.MODEL.DEVICE, num_processes = resolve_device(cfg.MODEL.DEVICE, num_gpus)
    validate(cfg, num_processes)
    cfg.freeze()
    return cfg, num_processes


def replay(cfg: CfgNode, run_dir: str, iteration: int) -> list[Replay]:
    """Run the steps from ``state_before`` to ``iteration`` with their batches, crops, masks and seeds.

    A collective operation; nothing is written into ``run_dir``.

    Returns:
        One Replay per rank, on every rank.

    Raises:
        CheckpointError, FileNotFoundError: if the state cannot be loaded.
    """
    cfg = default_setup(cfg, default_argument_parser().parse_args([]))
    trainer = _trainer_without_side_effects(trainer_class_of(cfg), cfg)
    path = state_before(run_dir, iteration)
    if path:
        trainer.start_iter = int(trainer.checkpointer.load(path)["iteration"]) + 1
    else:
        trainer.resume_or_load(resume=False)
    trainer.data_loader.batch_sampler.start_iter = trainer.start_iter  # type: ignore[attr-defined]
    logger.info("From %s: %d step(s) to run.", path or "the beginning", iteration - trainer.start_iter + 1)
    probe = _Probe(trainer)
    with trainer.storage:
        trainer.before_train()
        for step in range(trainer.start_iter, iteration):
            trainer.iter = step
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter = iteration
        trainer.register_hooks([probe])
        trainer.before_step()
        try:
            trainer.run_step()
        except FloatingPointError:
            logger.info("The step is refused here as well.")
    trainer.close_data_loader()
    return comm.all_gather(probe.found)


def _trainer_without_side_effects(trainer_class: type[DefaultTrainer], cfg: CfgNode) -> DefaultTrainer:
    class StepsOnly(trainer_class):  # type: ignore[misc, valid-type]
        def build_hooks(self) -> list[HookBase | None]:
            return [hook for hook in super().build_hooks() if isinstance(hook, _STEP_HOOKS)]

    return StepsOnly(cfg)


class _Probe(HookBase):
    """Watches every module and parameter during a step."""

    trainer: DefaultTrainer

    def __init__(self, trainer: DefaultTrainer) -> None:
        self.found = Replay({})
        self._part_size = 1
        self._num_targets = 0  # micro-batches that the teacher has seen before the first one went through the model
        self._num_parts = 0  # micro-batches that went or go through the model
        self._model = trainer.bare_model

    def before_step(self) -> None:
        trainer = self.trainer
        # A loader of another kind knows no positions, and its images cannot be named.
        self._part_size = len(positions_of(trainer.data_loader, trainer.iter)) // trainer.num_micro_batches
        self._model.register_forward_pre_hook(lambda module, args: self._see_batch(args[0]))
        for name, module in self._model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: self._see(name, output))
            if isinstance(module, Backbone):
                module.pick_tokens = self._watched(name, module.pick_tokens)  # type: ignore[method-assign]
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._see_gradient(name, p.grad))

    def before_optimizer_step(self) -> None:
        self.found.step = describe_step(self.trainer)
        self.found.is_finite = self.trainer.step_is_finite

    def _see_batch(self, batch: Any) -> None:
        self._num_parts += 1
        self._see("batch", batch)

    def _watched(self, name: str, pick_tokens: Callable[..., list[PickedTokens]]) -> Callable[..., list[PickedTokens]]:
        """A training step calls this method of a backbone, of which a hook of the module is not told."""

        def watched(*args: Any) -> list[PickedTokens]:
            picked = pick_tokens(*args)
            for tokens in picked:
                self._see(name, tokens.cls_token, row_per_crop=True)
                self._see(name, tokens.patches)
            self._num_targets += not self._num_parts
            return picked

        return watched

    def _see(self, name: str, output: Any, row_per_crop: bool = False) -> None:
        bad = [is_bad for t in _tensors(output) if (is_bad := ~torch.isfinite(t)).any()]
        if bad and not self.found.first_module:
            self.found.first_module = name or type(self._model).__name__
        # Crops and what a backbone makes of them: a row per crop, view after view. Within a block the rows are a draw of
        # stochastic depth, in a head they may be masked patches.
        has_rows = row_per_crop or isinstance(output, _ROW_PER_CROP) or (bool(bad) and bad[0].ndim == 4)
        if bad and has_rows and self._part_size and not self.found.images:
            rows = {row for is_bad in bad for row in is_bad.flatten(1).any(1).nonzero().flatten().tolist()}
            first = (self._num_parts - 1 if self._num_parts else self._num_targets) * self._part_size
            self.found.images = sorted({first + row % self._part_size for row in rows})

    def _see_gradient(self, name: str, gradient: Tensor | None) -> None:
        if not self.found.first_gradient and gradient is not None and not torch.isfinite(gradient).all():
            self.found.first_gradient = name


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors within an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _tensors(getattr(value, entry.name))
    elif isinstance(value, dict):
        yield from (t for entry in value.values() for t in _tensors(entry))
    elif isinstance(value, list | tuple):
        yield from (t for entry in value for t in _tensors(entry))


def verdict(replays: list[Replay], records: list[dict[str, Any]]) -> str:
    """One line: reproduced, or what came out here."""
    here = mean_losses([r.step for r in replays])
    loss = f"loss {here['total_loss']:.6g}"
    if replays[0].is_finite:
        return f"finite here: {loss}" if records else f"finite here, and no record says otherwise: {loss}"
    if not records:
        return f"not finite here ({loss}); there is no record to compare with"
    then = mean_losses(records)
    same = {name for name in then if math.isfinite(then[name]) == math.isfinite(here.get(name, 0.0))}
    if same == set(then):
        return "reproduced"
    return f"reproduced: not finite here either, but other terms are: {', '.join(sorted(set(then) - same))}"


def mean_losses(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Loss terms averaged over ranks."""
    return {name: sum(float(step["losses"][name]) for step in steps) / len(steps) for name in steps[0]["losses"]}


def render(replays: list[Replay], records: list[dict[str, Any]], drop_path: float) -> str:
    """The report, as text; its last line is the verdict."""
    here, then = mean_losses([r.step for r in replays]), mean_losses(records) if records else {}
    lines = [
        f"iteration {replays[0].step['iteration']}, {len(replays)} process(es) here, {len(records) or 'none'} recorded"
    ]
    for name, value in here.items():
        lines.append(f"  {name:<24} {value:<14.6g}" + (f" recorded {then[name]:.6g}" if name in then else ""))
    for rank, found in enumerate(replays):
        step = found.step
        lines.append(f"rank {rank}: positions {step['positions'][0]} to {step['positions'][-1]}")
        lines.append(f"  first module with an output that is not finite: {found.first_module or 'none'}")
        if len(found.images) == len(step["positions"]):
            lines.append("    in the rows of all images of the batch")
        elif len(found.images) * step["num_micro_batches"] == len(step["positions"]):
            lines.append(f"    in the rows of all images of micro-batch {found.images[0] // len(found.images)}")
        else:
            lines += [
                f"    image {i} of the batch, position {step['positions'][i]}: {step['images'][i]}"
                for i in found.images
            ]
        lines.append(f"  first gradient of the backward pass that is not finite: {found.first_gradient or 'none'}")
        lines.append(f"  parameters with such a gradient: {step['num_non_finite']} of {step['num_parameters']}")
    if records and len(records) != len(replays) and drop_path:
        lines.append(
            f"Stochastic depth draws per process: for the very same draws use --num-gpus {len(records)}, as the run did."
        )
    return "\n".join([*lines, f"verdict: {verdict(replays, records)}"])
