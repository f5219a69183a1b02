"""Training the heads of a linear probe on batches of features, with checkpoints that a killed probe goes on from."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import pickle
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinoengine.data import ImageDataset, PositionBatches, TrainingSampler
from dinoengine.evaluation.features import FeatureCollector, Features
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.evaluation.linear_heads import HeadGrid, LinearHeads
from dinoengine.evaluation.records import FOLDER
from dinoengine.solver.schedules import CosineSchedule
from dinoengine.utils import comm
from dinoengine.utils.file_writing import atomic_write
from dinoengine.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)


class FeatureBatch(NamedTuple):
    """This process's part of a batch: [B, width] float32 features, [B] labels, [B] indices in the dataset (CPU)."""

    features: Tensor
    labels: Tensor
    indices: Tensor


FeatureStream = Generator[FeatureBatch, None, None]


def feature_batches(model: nn.Module, grid: HeadGrid, data_loader: Any) -> FeatureStream:
    """The features of a loader of labelled ImageBatch, computed as they are asked for."""
    device = next(model.parameters()).device
    for batch in data_loader:
        on_device = batch.to(device, non_blocking=True)
        yield FeatureBatch(grid.features(model, on_device.images), on_device.labels, batch.indices)


def collect_features(batches: FeatureStream, dataset: ImageDataset | None = None) -> Features:
    """The features of a whole set of which each process has a part; the same on every process.

    Args:
        dataset: names its images in the error.

    Raises:
        ValueError: if some are not finite; names the images.
    """
    collector = FeatureCollector(dataset)
    for batch in batches:
        collector.add(*batch)
    return collector.finish()


def cached_stream(cache: Features, device: torch.device, batch_size: int, seed: int, start_iter: int) -> FeatureStream:
    """An endless stream of rows of ``cache``, in the order in which a training with this seed visits its images.

    Args:
        batch_size: global; each process gets its part.
    """
    assert cache.labels is not None, "a labelled set"
    sampler = TrainingSampler(len(cache), seed)
    for positions in PositionBatches(
        batch_size, rank=comm.get_rank(), world_size=comm.get_world_size(), start_iter=start_iter
    ):
        indices = torch.tensor([sampler.index_at(position) for position in positions])
        yield FeatureBatch(cache.features[indices].to(device), cache.labels[indices].to(device), indices)


class ProbeCheckpoint:
    """A probe on its way, in ``eval/linear_probe-<hash>.pth`` of a folder.

    The hash is of all that the heads depend on, so a file of other weights or settings is never taken up.
    """

    def __init__(self, output_dir: str, identity: Mapping[str, Any]) -> None:
        """
        Args:
            identity: hash of the backbone's weights, training set, preprocessing and settings; JSON-serialisable.
        """
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()
        self.path = os.path.join(output_dir, FOLDER, f"linear_probe-{self.digest[:16]}.pth")

    def save(self, heads: LinearHeads, iteration: int) -> None:
        """Write on the main process; ``iteration`` steps are done. Every process calls it."""
        comm.on_main_process(lambda: self._write({"iteration": iteration, "heads": heads.state_dict()}))

    def _write(self, state: Mapping[str, Any]) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with atomic_write(self.path) as file:
            torch.save(state, file)

    def load(self, heads: LinearHeads) -> int:
        """Put the saved state into ``heads``, on every process; the number of steps done, 0 if nothing was saved.

        Raises:
            ValueError: on every process, if the file cannot be read.
        """
        state = comm.on_main_process(self._read)
        if state is None:
            return 0
        heads.load_state_dict(state["heads"])
        return int(state["iteration"])

    def _read(self) -> dict[str, Any] | None:
        if not os.path.exists(self.path):
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path}, from which the linear probe would go on, cannot be read; delete it to start anew. ({error})"
            ) from error
        return state

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if comm.is_main_process():
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path)


def train_heads(
    heads: LinearHeads,
    make_stream: Callable[[int], FeatureStream],
    *,
    num_iters: int,
    batch_size: int,
    dataset: ImageDataset | None,
    checkpoint: ProbeCheckpoint,
    checkpoint_period: int = 0,
    save_at_end: bool = False,
    validate: Callable[[int], None],
    val_period: int = 0,
) -> None:
    """``num_iters`` steps with a cosine to 0, from where ``checkpoint`` stands.

    Args:
        make_stream: iteration -> an endless stream of this process's part of the batches from there on.
        batch_size: global.
        dataset: the training set, to name its images in an error.
        checkpoint_period: iterations; the end is saved, too. 0: never.
        save_at_end: save the end in any case.
        validate: called with the number of steps done every ``val_period`` iterations, but not at the end. 0: never.

    Raises:
        ValueError: if features are not finite; the same on every process.
    """
    start_iter = checkpoint.load(heads)
    if start_iter:
        logger.info("Linear probe: going on at iteration %d of %d from %s.", start_iter, num_iters, checkpoint.path)
    if start_iter == num_iters:
        return
    finite = FiniteCheck(dataset, "training features")
    factor = CosineSchedule(1.0, 0.0, num_iters)
    began = 0.0
    with contextlib.closing(make_stream(start_iter)) as stream:
        for iteration in range(start_iter, num_iters):
            batch = next(stream)
            finite.see(batch.features, batch.indices)
            finite.finish_batch(batch.features.device)
            losses = heads.step(batch.features, batch.labels, batch_size=batch_size, lr_factor=factor(iteration))
            done = iteration + 1
            num_timed = iteration - start_iter
            # The first batch has waited until all features were computed, if they are kept.
            if num_timed == 0:
                began = time.perf_counter()
            seconds_left = (time.perf_counter() - began) / max(1, num_timed) * (num_iters - done)
            if seconds_left > 5:
                lowest = losses.nan_to_num(nan=float("inf")).min().item()
                log_every_n_seconds(
                    logging.INFO,
                    f"Linear probe: iteration {done} of {num_iters}, lowest loss of a head {lowest:.4f}, about "
                    f"{datetime.timedelta(seconds=int(seconds_left))} left",
                    10,
                    name=__name__,
                    key="progress",
                )
            is_due = checkpoint_period > 0 and (done % checkpoint_period == 0 or done == num_iters)
            if is_due or (save_at_end and done == num_iters):
                checkpoint.save(heads, done)
            if val_period and done % val_period == 0 and done < num_iters:
                validate(done)
