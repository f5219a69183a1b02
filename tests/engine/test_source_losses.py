from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.engine import SSLTrainer
from dinoengine.engine.device_batches import DeviceBatches
from dinoengine.engine.source_losses import SourceLosses
from dinoengine.engine.train_loop import TrainerBase
from dinoengine.structures import SSLBatch

FIRST, SECOND = "synthetic:num_images=20:size=12", "synthetic:num_images=9:size=12:seed=1"


def _means(losses: SourceLosses) -> dict[str, float]:
    losses.gather()
    return losses.take_means()


def _add(losses: SourceLosses, sources: list[int], values: list[float], counts: bool = True) -> None:
    losses.add(torch.tensor(sources), torch.tensor(values))
    losses.end_step(counts)


def test_means_of_the_images_of_each_source_since_the_last_reading() -> None:
    losses = SourceLosses(("a", "b", "a", "never"), torch.device("cpu"))
    _add(losses, [0, 1, 0], [1.0, 5.0, 2.0])
    _add(losses, [0, 2], [6.0, 8.0])
    assert _means(losses) == {"loss/source/a": 3.0, "loss/source/b": 5.0, "loss/source/a 2": 8.0}
    _add(losses, [1], [7.0])
    assert _means(losses) == {"loss/source/b": 7.0}
    assert _means(losses) == {}


def test_when_steps_are_gathered_and_a_pause_in_between_change_no_bit() -> None:
    values = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)).tolist()
    at_once, paused = (SourceLosses(("a", "b"), torch.device("cpu")) for _ in range(2))
    for step in values:
        _add(at_once, [0, 1], step)
    for i, step in enumerate(values):
        _add(paused, [0, 1], step)
        if i == 2:
            paused.gather()
            state = json.loads(json.dumps(paused.state_dict()))
            paused = SourceLosses(("a", "b"), torch.device("cpu"))
            paused.load_state_dict(state)
        elif i == 4:
            paused.gather()
    assert _means(paused) == _means(at_once)


def test_a_step_that_does_not_count_leaves_nothing() -> None:
    losses = SourceLosses(("a",), torch.device("cpu"))
    _add(losses, [0], [float("nan")], counts=False)
    _add(losses, [0], [2.0])
    assert _means(losses) == {"loss/source/a": 2.0}


def test_without_names_or_values_nothing_is_summed() -> None:
    losses = SourceLosses((), torch.device("cpu"))
    _add(losses, [0], [2.0])
    assert _means(losses) == {}
    losses = SourceLosses(("a", "b"), torch.device("cpu"))
    losses.add(None, torch.ones(2))
    losses.add(torch.zeros(2, dtype=torch.int64), None)
    losses.end_step(counts=True)
    assert _means(losses) == {}


def test_sums_and_numbers_are_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = SourceLosses(("a", "b"), torch.device("cpu"))
    _add(losses, [0, 1], [1.0, 4.0])
    other = torch.tensor([[9.0, 0.0], [3.0, 0.0]], dtype=torch.float64)  # three images of a, none of b
    monkeypatch.setattr("dinoengine.engine.source_losses.comm.all_reduce_sum", lambda t: t + other)
    assert _means(losses) == {"loss/source/a": 2.5, "loss/source/b": 4.0}


class _Recorder(SSLTrainer):
    """Keeps what each step had: sources, and the losses of the images."""

    has_sources = True

    def __init__(self, cfg: CfgNode) -> None:
        self.seen: list[SSLBatch] = []
        super().__init__(cfg)
        self._batches = DeviceBatches(self.data_loader, self.device)
        fetch = self._batches.fetch

        def recorded(iteration: int) -> tuple[SSLBatch, float]:
            batch, seconds = fetch(iteration)
            self.seen.append(batch if self.has_sources else dataclasses.replace(batch, sources=None))
            return self.seen[-1], seconds

        self._batches.fetch = recorded  # type: ignore[method-assign]

    def build_hooks(self) -> list[Any]:
        return []


def _train(cfg: CfgNode, *overrides: Any) -> _Recorder:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 5, "LOG.PERIOD", 2, *overrides])
    trainer = _Recorder(cfg)
    TrainerBase.train(trainer, 0, 5)
    return trainer


def _history(trainer: _Recorder, name: str) -> dict[int, float]:
    return {iteration: value for value, iteration in trainer.storage.history(name).values()}


@pytest.mark.parametrize("parts", [1, 2])
def test_weighted_with_their_images_the_sources_have_the_total_loss(tiny_cfg: CfgNode, parts: int) -> None:
    names = (FIRST, SECOND)
    trainer = _train(tiny_cfg, "DATASETS.TRAIN", repr(names), "SOLVER.NUM_MICRO_BATCHES", parts)
    total = _history(trainer, "total_loss")
    histories = [_history(trainer, f"loss/source/{name}") for name in names]
    for iterations in ((0, 1), (2, 3), (4,)):  # LOG.PERIOD 2, and the rest at the end
        sources = torch.cat([trainer.seen[i].sources for i in iterations])  # type: ignore[misc]
        positions = torch.cat([trainer.seen[i].positions for i in iterations])
        stream = trainer.data_loader.dataset  # type: ignore[attr-defined]
        assert sources.tolist() == [int(stream.index_at(p) >= 20) for p in positions.tolist()]
        counts = torch.bincount(sources, minlength=2).tolist()
        means = [history.get(iterations[-1], 0.0) for history in histories]
        expected = sum(total[i] for i in iterations) / len(iterations)
        assert sum(n * m for n, m in zip(counts, means, strict=True)) / sum(counts) == pytest.approx(expected, rel=1e-5)


def test_the_log_changes_no_weight(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(trainer: _Recorder) -> dict[str, Tensor]:
        return trainer.bare_model.state_dict()

    mixture = ("DATASETS.TRAIN", repr((FIRST, SECOND)))
    with_log = state(_train(tiny_cfg, *mixture))
    monkeypatch.setattr(_Recorder, "has_sources", False)
    trainer = _train(tiny_cfg, *mixture)
    assert not [name for name in trainer.storage.names("metric") if "source" in name]
    assert all(torch.equal(value, with_log[name]) for name, value in state(trainer).items())


def test_one_dataset_has_no_sources(tiny_cfg: CfgNode) -> None:
    trainer = _train(tiny_cfg, "DATASETS.TRAIN", repr((FIRST,)))
    assert trainer.seen[0].sources is None
    assert not [name for name in trainer.storage.names("metric") if "source" in name]
