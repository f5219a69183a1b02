"""Whether two runs are the same: what they were fed, and what came of it.

    python -m dinoengine.engine.verify [--kill-at N] <words of tools/train_net.py>

is a training that writes down a hash of every sample it is given, and ends itself with SIGKILL before iteration N.
``tools/verify_resume.py`` starts it and compares.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint import read_checkpoint
from dinoengine.checkpoint.digest import content_digest
from dinoengine.engine.command import run_command
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.hooks import CallbackHook
from dinoengine.engine.train_loop import TrainerBase
from dinoengine.utils import comm

_SAMPLES_FILE = "samples_rank{rank}.jsonl"
# Entries of a checkpoint that come from a clock.
_TIMES = ("time", "data_time", "eval_time")


def sample_hashes(batch: Any) -> list[str]:
    """One SHA-256 per image of an SSLBatch or ImageBatch: of its crops, masks, label and position."""
    hashes = []
    for sample in batch.split(len(batch)):
        values = {field.name: getattr(sample, field.name) for field in fields(sample)}
        hashes.append(content_digest({name: value for name, value in values.items() if isinstance(value, Tensor)}))
    return hashes


class RecordedLoader:
    """A training loader that writes the hashes of the samples of each iteration to ``OUTPUT_DIR/samples_rank<r>.jsonl``."""

    def __init__(self, loader: Any, output_dir: str) -> None:
        self.loader = loader
        self.batch_sampler = loader.batch_sampler  # where a trainer sets the first iteration
        self.dataset = loader.dataset
        self.path = os.path.join(output_dir, _SAMPLES_FILE.format(rank=comm.get_rank()))

    def __iter__(self) -> Iterator[Any]:
        first = self.batch_sampler.start_iter
        for iteration, batch in enumerate(self.loader, first):
            with open(self.path, "a", encoding="utf-8") as file:
                row = {"iteration": iteration, "rank": comm.get_rank(), "samples": sample_hashes(batch.to("cpu"))}
                file.write(json.dumps(row) + "\n")
            yield batch


@dataclass(frozen=True)
class Recording:
    """Makes a trainer record its samples: for ``run_command(prepare=...)``, picklable for spawned processes.

    Attributes:
        kill_at: iteration before which rank 0 ends itself with SIGKILL; -1: never.
    """

    kill_at: int = -1

    def __call__(self, trainer: DefaultTrainer) -> None:
        trainer.data_loader = RecordedLoader(trainer.data_loader, trainer.cfg.OUTPUT_DIR)
        if self.kill_at >= 0 and comm.is_main_process():
            trainer.register_hooks([CallbackHook(before_step=self._kill)])

    def _kill(self, trainer: TrainerBase) -> None:
        if trainer.iter == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def recorded_samples(output_dir: str) -> dict[int, list[str]]:
    """Iteration -> hashes of the samples of the global batch, in its order, whatever the number of processes.

    Raises:
        ValueError: if an iteration that was repeated after a crash got other samples than before.
    """
    rows: dict[int, dict[tuple[int, int], list[str]]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(output_dir), _SAMPLES_FILE.format(rank="*")))):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):  # cut short by the crash; the iteration was repeated
                    continue
                row = json.loads(line)
                part = (len(row["samples"]), row["rank"])
                known = rows.setdefault(row["iteration"], {}).setdefault(part, row["samples"])
                if known != row["samples"]:
                    raise ValueError(f"Iteration {row['iteration']} was repeated with other samples ({path}).")
    return {iteration: _global_batch(parts, iteration) for iteration, parts in sorted(rows.items())}


def _global_batch(parts: dict[tuple[int, int], list[str]], iteration: int) -> list[str]:
    """The samples of all ranks; an iteration repeated with another number of processes has them once for each number."""
    by_size: dict[int, list[str]] = {}
    for (size, _), samples in sorted(parts.items()):
        by_size.setdefault(size, []).extend(samples)
    batch = max(by_size.values(), key=len)
    for (size, rank), samples in parts.items():
        if samples != batch[size * rank : size * (rank + 1)]:
            raise ValueError(f"Iteration {iteration} was repeated with other samples.")
    return batch


@dataclass(frozen=True)
class StateComparison:
    """What differs between two checkpoints.

    Attributes:
        num_entries: tensors and plain values compared, without those that come from a clock.
        different: names of the entries that are not bitwise equal.
        largest: largest difference between two tensors of numbers, relative to the largest value in them; infinity where
            shapes or entries are missing, NaN where there are NaN.
    """

    num_entries: int
    different: list[str]
    largest: float


def compare_checkpoints(a: str, b: str, parts: Sequence[str] = ("model", "trainer", "iteration")) -> StateComparison:
    """Two checkpoint files of dinoengine, entry by entry.

    Raises:
        FileNotFoundError, CheckpointError: if one cannot be read.
    """
    ours, theirs = (_flat({part: read_checkpoint(path).get(part) for part in parts}) for path in (a, b))
    different = [name for name in sorted({**ours, **theirs}) if not _equal(ours.get(name), theirs.get(name))]
    largest = max((_difference(ours.get(name), theirs.get(name)) for name in different), default=0.0, key=_nan_last)
    return StateComparison(len(ours), different, largest)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = [
            (k, v) for k, v in value.items() if not (prefix == "trainer.storage." and k in _TIMES)
        ]
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {prefix[:-1]: value}
    return {name: v for key, inner in items for name, v in _flat(inner, f"{prefix}{key}.").items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and bool(a == b)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, so that -0.0 is not 0.0 and NaN is NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(tensor.shape)


def _difference(a: Any, b: Any) -> float:
    try:
        x, y = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return math.inf
    if x.shape != y.shape:
        return math.inf
    scale = float(torch.maximum(x.abs(), y.abs()).max())
    return float((x - y).abs().max()) / scale if scale else 0.0


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--kill-at", type=int, default=-1)
    args, words = parser.parse_known_args(argv)
    run_command(argv=words, prepare=Recording(args.kill_at))


if __name__ == "__main__":
    # Spawned processes import this module under its own name, and what they are given must be of that one.
    from dinoengine.engine.verify import main as main_of_the_module

    main_of_the_module(sys.argv[1:])
