"""Batches fetched ahead: the same ones, the same errors, honest waiting times. Streams and events are stand-ins without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.data.samplers import PositionBatches
from dinoengine.engine import SimpleTrainer
from dinoengine.engine.device_batches import DeviceBatches
from dinoengine.structures import SSLBatch
from tests.engine.toys import ToyData, toy_trainer

CPU = torch.device("cpu")


class _Clock:
    """Seconds; ``compute_end``: when the device has worked off what the step queued."""

    def __init__(self) -> None:
        self.now = 0.0
        self.compute_end = 0.0

    def event(self, enable_timing: bool = False) -> Any:
        clock = self

        class Event:
            def record(self, stream: Any = None) -> None:
                self.at = clock.compute_end if stream == "compute" else clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return 1000 * (end.at - self.at)

        return Event()


class _Loader:
    """Endless batches that say their iteration; each takes ``seconds`` of the clock. Starts where its sampler says."""

    def __init__(self, clock: _Clock, seconds: float = 0.0, bad: int = -1) -> None:
        self.clock, self.seconds, self.bad = clock, seconds, bad
        self.batch_sampler = PositionBatches(1)

    def __iter__(self) -> Iterator[Tensor]:
        iteration = self.batch_sampler.start_iter
        while True:
            self.clock.now += self.seconds
            if iteration == self.bad:
                raise ValueError(f"batch {iteration} is bad")
            yield torch.tensor([iteration])
            iteration += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "compute")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr("dinoengine.engine.device_batches.time.perf_counter", lambda: clock.now)
    return clock


def _ahead(loader: Any) -> DeviceBatches:
    batches = DeviceBatches(loader, CPU)
    batches._side_stream = "side"  # type: ignore[assignment]
    return batches


@pytest.mark.parametrize(
    ("compute_seconds", "expected"),
    [(10.0, 0.0), (0.0, 3.0), (2.0, 1.0)],
    ids=["hidden by the step", "nothing to hide behind", "in part"],
)
def test_data_time_is_what_the_device_waited(clock: _Clock, compute_seconds: float, expected: float) -> None:
    batches = _ahead(_Loader(clock, seconds=3.0))
    assert batches.fetch(0)[1] == 3.0  # nothing was fetched ahead
    clock.compute_end = clock.now + compute_seconds
    batches.fetch_ahead(1)
    batch, waited = batches.fetch(1)
    assert (batch.item(), waited) == (1, pytest.approx(expected))


def test_time_before_the_fetch_is_not_counted(clock: _Clock) -> None:
    """The device was idle for long when the loader was asked: not the loader's fault."""
    batches = _ahead(_Loader(clock, seconds=0.5))
    clock.now, clock.compute_end = 100.0, 20.0
    batches.fetch_ahead(0)
    assert batches.fetch(0)[1] == pytest.approx(0.5)


def test_an_error_of_the_next_batch_belongs_to_its_iteration(clock: _Clock) -> None:
    batches = _ahead(_Loader(clock, bad=1))
    batches.fetch(0)
    batches.fetch_ahead(1)
    with pytest.raises(ValueError, match="batch 1 is bad"):
        batches.fetch(1)


class _BadBatch:
    """Arrives whole, and fails when its crops are made on the device."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        raise RuntimeError("no memory for crops")

    def record_stream(self, stream: Any) -> None: ...


def test_an_error_of_making_crops_ahead_belongs_to_their_iteration(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = _ahead(_Loader(clock))
    batches.fetch(0)
    monkeypatch.setattr(batches.fetcher, "fetch", lambda iteration: _BadBatch())
    batches.fetch_ahead(1)  # in the middle of step 0
    with pytest.raises(RuntimeError, match="no memory for crops"):
        batches.fetch(1)


def test_closing_loses_no_batch(clock: _Clock) -> None:
    batches = _ahead(_Loader(clock))
    assert batches.fetch(4)[0].item() == 4
    batches.fetch_ahead(5)
    batches.close()
    assert batches.fetch(5)[0].item() == 5  # by a loader that was started anew


def test_crops_are_made_ahead(clock: _Clock, tiny_cfg: CfgNode) -> None:
    """On the side stream, behind the copy: what a step gets has them, and what was copied is let go of."""
    tiny_cfg.INPUT.AUGMENTATION_BACKEND = "device"
    loader = build_train_loader(tiny_cfg)
    batches = _ahead(loader)
    batches.fetch_ahead(0)
    assert batches._held is not None
    assert isinstance(batches._held.batch, SSLBatch)
    assert torch.equal(batches.fetch(0)[0].global_crops, next(iter(loader)).to("cpu").global_crops)


def test_another_iteration_than_the_one_fetched_ahead_is_a_mistake(clock: _Clock) -> None:
    batches = _ahead(_Loader(clock))
    batches.fetch_ahead(1)
    with pytest.raises(AssertionError, match="fetched 1 ahead, asked for 0"):
        batches.fetch(0)


def test_a_batch_of_another_type_is_handed_on(clock: _Clock) -> None:
    batches = _ahead([["a"], ["b"]])
    batches.fetch_ahead(0)
    assert batches.fetch(0)[0] == ["a"]
    assert batches.fetch(1)[0] == ["b"]


def test_without_a_side_stream_nothing_is_taken_ahead(clock: _Clock) -> None:
    loader = _Loader(clock, seconds=2.0)
    batches = DeviceBatches(loader, CPU)
    batches.fetch(0)
    batches.fetch_ahead(1)
    assert clock.now == 2.0


def test_a_training_with_and_without_it_is_the_same_to_the_bit(clock: _Clock) -> None:
    def weights(ahead: bool) -> tuple[list[Tensor], list[int]]:
        taken: list[int] = []

        class Data(ToyData):
            def __iter__(self) -> Iterator[Tensor]:
                for i, batch in enumerate(super().__iter__()):
                    taken.append(i)
                    yield batch

        trainer: SimpleTrainer = toy_trainer(Data())
        if ahead:
            trainer._batches = _ahead(trainer.data_loader)
        trainer.train(0, 6)
        return [p.detach().clone() for p in trainer.model.parameters()], taken

    usual, ahead = weights(False), weights(True)
    assert all(torch.equal(a, b) for a, b in zip(usual[0], ahead[0], strict=True))
    assert usual[1] == ahead[1] == list(range(6))  # no batch behind the last iteration


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_each_batch_arrives_whole() -> None:
    """Kernels of a step still read its batch while memory of an older one may be reused for the next."""
    source = [torch.randn(1 << 20, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    batches = DeviceBatches([batch.pin_memory() for batch in source], torch.device("cuda"))
    sums = []
    for i in range(8):
        batch, waited = batches.fetch(i)
        for _ in range(50):
            batch = batch.roll(1)
        sums.append(batch)
        if i < 7:
            batches.fetch_ahead(i + 1)
        assert waited >= 0
    for rolled, expected in zip(sums, source, strict=True):
        assert torch.equal(rolled.cpu(), expected.roll(50))
