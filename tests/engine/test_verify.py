"""Hashes of samples and comparison of states: they must see what differs, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.data import build_train_loader
from dinoengine.engine.verify import RecordedLoader, compare_checkpoints, recorded_samples, sample_hashes


def _write(folder: Path, rank: int, *rows: tuple[int, list[str]], end: str = "\n") -> None:
    lines = [json.dumps({"iteration": i, "rank": rank, "samples": samples}) for i, samples in rows]
    with open(folder / f"samples_rank{rank}.jsonl", "a") as file:
        file.write("\n".join(lines) + end)


def test_a_sample_has_its_hash_in_whatever_batch_it_comes(tiny_cfg: Any) -> None:
    whole = next(iter(build_train_loader(tiny_cfg)))
    parts = [next(iter(build_train_loader(tiny_cfg, rank=rank, world_size=2))) for rank in (0, 1)]
    hashes = sample_hashes(whole)
    assert len(set(hashes)) == len(whole)
    assert hashes == [h for part in parts for h in sample_hashes(part)]


@pytest.mark.parametrize("name", ["global_crops", "local_crops", "masks", "positions"])
def test_a_changed_bit_changes_the_hash_of_its_sample_alone(tiny_cfg: Any, name: str) -> None:
    batch = next(iter(build_train_loader(tiny_cfg)))
    before = sample_hashes(batch)
    tensor = getattr(batch, name)
    tensor.view(-1)[-1] = tensor.view(-1)[-1] ^ 1
    assert [a == b for a, b in zip(before, sample_hashes(batch), strict=True)] == [True] * (len(batch) - 1) + [False]


def test_a_recorded_loader_counts_from_where_the_run_starts(tiny_cfg: Any, tmp_path: Path) -> None:
    loader = RecordedLoader(build_train_loader(tiny_cfg), str(tmp_path))
    loader.batch_sampler.start_iter = 3
    iterator = iter(loader)
    fourth = next(iterator)
    assert recorded_samples(str(tmp_path)) == {3: sample_hashes(fourth)}


def test_decoded_images_are_recorded_by_the_crops_they_become(tiny_cfg: Any, tmp_path: Path) -> None:
    tiny_cfg.INPUT.AUGMENTATION_BACKEND = "device"
    batch = next(iter(RecordedLoader(build_train_loader(tiny_cfg), str(tmp_path))))
    assert recorded_samples(str(tmp_path)) == {0: sample_hashes(batch.to("cpu"))}


def test_parts_of_ranks_are_put_together_and_repeats_compared(tmp_path: Path) -> None:
    _write(tmp_path, 0, (0, ["a", "b"]), (1, ["e", "f"]))
    _write(tmp_path, 1, (0, ["c", "d"]), (1, ["g", "h"]), (2, ["k", "l"]))  # rank 0 was killed before it wrote
    _write(tmp_path, 0, (2, ["i", "j", "k", "l"]))  # the resumed run had one process
    assert recorded_samples(str(tmp_path)) == {0: list("abcd"), 1: list("efgh"), 2: list("ijkl")}
    _write(tmp_path, 1, (2, ["k", "x"]))
    with pytest.raises(ValueError, match="Iteration 2 was repeated with other samples"):
        recorded_samples(str(tmp_path))


def test_a_line_cut_short_by_a_crash_is_of_no_iteration(tmp_path: Path) -> None:
    _write(tmp_path, 0, (0, ["a"]))
    _write(tmp_path, 0, (1, ["b"]), end="")
    assert recorded_samples(str(tmp_path)) == {0: ["a"]}


def _save(path: Path, weight: torch.Tensor, time: float = 0.0, momentum: float = 0.9) -> str:
    history = {"loss": {"values": [[1.0, 0]]}, "time": {"values": [[time, 0]]}}
    trainer = {"storage": history, "optimizer": {"momentum": momentum}}
    torch.save({"model": {"w": weight}, "trainer": trainer, "iteration": 4}, path)
    return str(path)


def test_states_are_equal_but_for_the_clock(tmp_path: Path) -> None:
    a = _save(tmp_path / "a.pth", torch.tensor([1.0, math.nan]), time=1.0)
    b = _save(tmp_path / "b.pth", torch.tensor([1.0, math.nan]), time=2.0)
    assert compare_checkpoints(a, b).different == []


@pytest.mark.parametrize(
    ("weight", "largest"),
    [
        (torch.tensor([1.0, 2.0 + 2**-22]), 2**-23),
        (torch.tensor([-1.0, 2.0]), 1.0),
        (torch.tensor([1.0]), math.inf),
        (torch.tensor([1.0, math.nan]), math.nan),
    ],
)
def test_differences_are_named_and_measured(tmp_path: Path, weight: torch.Tensor, largest: float) -> None:
    a = _save(tmp_path / "a.pth", torch.tensor([1.0, 2.0]))
    found = compare_checkpoints(a, _save(tmp_path / "b.pth", weight))
    assert found.different == ["model.w"]
    assert found.largest == pytest.approx(largest, rel=1e-6, nan_ok=True)


def test_the_sign_of_zero_and_plain_values_count(tmp_path: Path) -> None:
    a = _save(tmp_path / "a.pth", torch.tensor([0.0]))
    b = _save(tmp_path / "b.pth", torch.tensor([-0.0]), momentum=0.8)
    assert compare_checkpoints(a, b).different == ["model.w", "trainer.optimizer.momentum"]
