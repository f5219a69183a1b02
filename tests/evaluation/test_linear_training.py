from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.data import TrainingSampler
from dinoengine.evaluation import Features, HeadGrid, LinearHeads, linear_training
from dinoengine.evaluation.linear_training import (
    FeatureStream,
    ProbeCheckpoint,
    cached_stream,
    collect_features,
    feature_batches,
    train_heads,
)
from tests.evaluation.fakes import identity_features, make_loader

ROWS, DIM, CLASSES, BATCH = 10, 4, 3, 4
CACHE = Features(torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(ROWS) % CLASSES)
GRID = HeadGrid((1.0, 10.0), (1,), (False,))


def _stream(start_iter: int) -> FeatureStream:
    return cached_stream(CACHE, torch.device("cpu"), BATCH, seed=5, start_iter=start_iter)


def _train(
    checkpoint: ProbeCheckpoint, stream: Callable[[int], FeatureStream] = _stream, **settings: Any
) -> LinearHeads:
    heads = LinearHeads(GRID, DIM, CLASSES)
    settings = {"num_iters": 9, "validate": lambda iteration: None, **settings}
    train_heads(heads, stream, batch_size=BATCH, dataset=None, checkpoint=checkpoint, **settings)
    return heads


def _parameters(heads: LinearHeads) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in heads.state_dict()["parameters"]]


def test_cached_features_come_in_the_order_of_a_training() -> None:
    sampler = TrainingSampler(ROWS, 5)
    stream = _stream(2)
    for iteration in range(2, 6):
        batch = next(stream)
        expected = [sampler.index_at(iteration * BATCH + i) for i in range(BATCH)]
        assert batch.indices.tolist() == expected
        assert batch.labels.tolist() == [i % CLASSES for i in expected]
        assert torch.equal(batch.features, CACHE.features[expected])


def test_collected_features_are_in_the_order_of_the_dataset() -> None:
    loader = make_loader(CACHE.features, CACHE.labels, order=[3, 1, 2, 0, *range(4, ROWS)])
    collected = collect_features(feature_batches(identity_features(DIM), GRID, loader))
    assert torch.equal(collected.features, CACHE.features)
    assert collected.labels is not None
    assert collected.labels.tolist() == [i % CLASSES for i in range(ROWS)]


class KilledError(Exception):
    pass


def _killed_after(num_batches: int) -> Callable[[int], FeatureStream]:
    def stream(start_iter: int) -> FeatureStream:
        for number, batch in enumerate(_stream(start_iter)):
            if number == num_batches:
                raise KilledError
            yield batch

    return stream


def test_a_killed_probe_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight = _train(ProbeCheckpoint(str(tmp_path / "straight"), {}))
    checkpoint = ProbeCheckpoint(str(tmp_path), {"weights": "a"})
    with pytest.raises(KilledError):
        _train(checkpoint, _killed_after(7), checkpoint_period=3)
    started = []

    def stream(start_iter: int) -> FeatureStream:
        started.append(start_iter)
        return _stream(start_iter)

    assert _parameters(_train(checkpoint, stream, checkpoint_period=3)) == _parameters(straight)
    assert started == [6]
    # The end was saved, too: once more is no training at all.
    assert _parameters(_train(checkpoint, stream, checkpoint_period=3)) == _parameters(straight)
    assert started == [6]
    checkpoint.remove()
    checkpoint.remove()
    assert list((tmp_path / "eval").iterdir()) == []


def test_a_checkpoint_of_other_weights_is_not_taken_up(tmp_path: Path) -> None:
    heads = LinearHeads(GRID, DIM, CLASSES)
    first, other = (ProbeCheckpoint(str(tmp_path), {"weights": name}) for name in "ab")
    first.save(heads, 4)
    assert first.load(heads) == 4
    assert other.load(heads) == 0


def test_without_a_period_nothing_is_written(tmp_path: Path) -> None:
    _train(ProbeCheckpoint(str(tmp_path), {}))
    assert list(tmp_path.iterdir()) == []


def test_the_lr_falls_in_a_cosine_to_zero() -> None:
    factors = []

    class Recording(LinearHeads):
        def step(self, *args: Any, lr_factor: float, **kwargs: Any) -> Any:
            factors.append(lr_factor)
            return super().step(*args, lr_factor=lr_factor, **kwargs)

    heads = Recording(GRID, DIM, CLASSES)
    validated: list[int] = []
    train_heads(
        heads,
        _stream,
        num_iters=6,
        batch_size=BATCH,
        dataset=None,
        checkpoint=ProbeCheckpoint("nowhere", {}),
        validate=validated.append,
        val_period=2,
    )
    assert factors == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert validated == [2, 4]  # what is reached at the end is the result


def test_features_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def stream(start_iter: int) -> FeatureStream:
        for batch in _stream(start_iter):
            yield batch._replace(features=batch.features.masked_fill(batch.indices[:, None] == 7, float("nan")))

    with pytest.raises(
        ValueError, match=r"The training features of 1 of \d+ images are not finite, e\.g\. images number \[7\]"
    ):
        _train(ProbeCheckpoint(str(tmp_path), {}), stream)


def test_the_wait_for_the_first_batch_is_not_taken_for_the_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, said = [0.0], []
    monkeypatch.setattr(linear_training.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(linear_training, "log_every_n_seconds", lambda level, message, *_, **__: said.append(message))

    def stream(start_iter: int) -> FeatureStream:
        for number, batch in enumerate(_stream(start_iter)):
            clock[0] += 10 if number else 3600
            yield batch

    _train(ProbeCheckpoint(str(tmp_path), {}), stream, num_iters=4)
    assert [message.rpartition("about ")[2] for message in said] == ["0:00:20 left", "0:00:10 left"]
