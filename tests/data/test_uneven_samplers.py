from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from dinoengine.data import ClassBalancedSampler, PositionBatches, TrainingSampler, WeightedSampler
from dinoengine.data.samplers import PositionSampler
from dinoengine.data.uneven_samplers import read_sample_weights

# Class 2 has no image, and the classes are not in order.
LABELS = np.array([3, 0, 0, 1, 0, 3, 0, 0, 1, 0, 0, 0], dtype=np.int32)
WEIGHTS = np.array([0.0, 1.0, 2.5, 0.0, 0.1, 7.0, 1e-3, 3.0, 0.0])


def _indices(sampler: PositionSampler, positions: range) -> list[int]:
    return [sampler.index_at(p) for p in positions]


# ---- classes


def test_each_class_once_in_every_run_of_as_many_positions_as_classes() -> None:
    labels = LABELS[_indices(ClassBalancedSampler(LABELS, seed=4), range(3 * 200))].reshape(200, 3)
    assert (np.sort(labels, axis=1) == [0, 1, 3]).all()
    assert len({tuple(run) for run in labels}) == 6  # in every order


def test_images_of_a_class_take_turns() -> None:
    indices = _indices(ClassBalancedSampler(LABELS, seed=4), range(3 * 8 * 20))
    for label, size in ((0, 8), (1, 2), (3, 2)):
        drawn = [i for i in indices if LABELS[i] == label]
        passes = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        assert all(sorted(one) == np.flatnonzero(label == LABELS).tolist() for one in passes)
        assert len({tuple(one) for one in passes}) > 1


def test_one_class_is_a_plain_stream() -> None:
    indices = _indices(ClassBalancedSampler(np.zeros(7, dtype=np.int64), seed=0), range(14))
    assert sorted(indices[:7]) == sorted(indices[7:]) == list(range(7))


@pytest.mark.parametrize("labels", [[], [0, -1]])
def test_images_without_label_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=f"that all have a label, got {len(labels)} labels"):
        ClassBalancedSampler(np.array(labels, dtype=np.int64), seed=0)


# ---- weights


def test_in_each_pass_an_image_comes_its_share_rounded_down_or_up() -> None:
    sampler, expected = WeightedSampler(WEIGHTS, seed=2), len(WEIGHTS) * WEIGHTS / WEIGHTS.sum()
    total = np.zeros(len(WEIGHTS))
    passes = 3000
    for epoch in range(passes):
        counts = np.bincount(_indices(sampler, range(9 * epoch, 9 * epoch + 9)), minlength=9)
        assert (np.floor(expected) <= counts).all()
        assert (counts <= np.ceil(expected)).all()
        total += counts
    # What is above the floor is one draw of a coin per pass; five standard deviations.
    fraction = expected - np.floor(expected)
    assert (np.abs(total / passes - expected) <= 5 * np.sqrt(fraction * (1 - fraction) / passes) + 1e-12).all()
    assert total[WEIGHTS == 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 2, 7, 255, 1024, 1797])
def test_equal_weights_give_each_image_once_per_pass(size: int) -> None:
    sampler = WeightedSampler(np.full(size, 0.3), seed=1)
    for epoch in (0, 5):
        assert sorted(_indices(sampler, range(epoch * size, (epoch + 1) * size))) == list(range(size))


def test_the_places_of_an_image_in_a_pass_are_random() -> None:
    """Half of all positions are image 0's: 300 of 600, in 150 runs if independent, in 1 if sorted."""
    indices = np.array(_indices(WeightedSampler(np.array([300.0] + [1.0] * 300), seed=0), range(301)))
    runs = np.count_nonzero(np.diff(indices == 0)) + 1
    assert 105 < runs < 195  # five standard deviations of 8.7


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="numbers >= 0, not all of them 0"):
        WeightedSampler(np.array(weights), seed=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_weights_of_a_file(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "w.npy", np.array([1, 0, 3], dtype=dtype))
    weights = read_sample_weights(str(tmp_path / "w.npy"), 3)
    assert (weights.tolist(), isinstance(weights, np.memmap)) == ([1, 0, 3], True)


def test_wrong_files_of_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"SAMPLE_WEIGHTS: there is no file .*none\.npy"):
        read_sample_weights(str(tmp_path / "none.npy"), 3)
    path = tmp_path / "w.npy"
    for content, found in (
        (np.ones(4), r"holds float64 \[4\]"),
        (np.ones((3, 1)), r"holds float64 \[3, 1\]"),
        (np.array(["a", "b", "c"]), "holds <U1"),
        (np.array([None, 1, 2]), "cannot be read"),
    ):
        np.save(path, content, allow_pickle=True)
        with pytest.raises(ValueError, match=rf"a number for each of the 3 images of DATASETS\.TRAIN.*{found}"):
            read_sample_weights(str(path), 3)
    for raw in (b"", b"1 2 3"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="cannot be read"):
            read_sample_weights(str(path), 3)
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))
    with pytest.raises(ValueError, match="holds several arrays"):
        read_sample_weights(str(path), 3)


# ---- both


def _both(seed: int = 3) -> list[PositionSampler]:
    return [ClassBalancedSampler(LABELS, seed), WeightedSampler(WEIGHTS, seed)]


def test_the_image_is_a_function_of_seed_and_position() -> None:
    positions = [0, 10**12 + 5, 65_536, 1, 7, 10**15]
    first = [[sampler.index_at(p) for p in positions] for sampler in _both()]
    assert [[s.index_at(p) for p in reversed(positions)][::-1] for s in _both()] == first
    for one, other in zip(_both(), _both(seed=4), strict=True):
        assert _indices(one, range(100)) != _indices(other, range(100))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("which", [0, 1])
def test_ranks_together_have_the_stream_also_from_the_middle(which: int, world_size: int) -> None:
    sampler = _both()[which]
    ranks = [PositionBatches(8, rank=r, world_size=world_size, start_iter=5) for r in range(world_size)]
    steps = islice(zip(*ranks, strict=True), 6)
    assert [sampler.index_at(p) for step in steps for p in chain(*step)] == _indices(_both()[which], range(40, 88))


def test_a_million_images_take_bytes_each_and_no_list() -> None:
    labels, weights = np.arange(1_000_000, dtype=np.int32) % 10, np.ones(1_000_000, dtype=np.float32)
    tracemalloc.start()
    balanced = ClassBalancedSampler(labels, seed=0)
    weighted = WeightedSampler(weights, seed=0)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 12_000_000 + 100_000  # 4 and 8 bytes per image
    assert Counter(labels[_indices(balanced, range(10**9, 10**9 + 50))].tolist()) == dict.fromkeys(range(10), 5)
    assert len(set(_indices(weighted, range(7_000_000, 7_002_000)))) == 2000


def test_the_size_is_that_of_the_set() -> None:
    assert [s.size for s in (*_both(), TrainingSampler(12, 0))] == [12, 9, 12]
