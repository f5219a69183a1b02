from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from dinoengine.data import InferenceSampler, MixtureSampler, PositionBatches, TrainingSampler

AWKWARD = (255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 1797, 4097)


def _epoch(sampler: TrainingSampler, epoch: int) -> list[int]:
    return [sampler.index_at(p) for p in range(epoch * sampler.size, (epoch + 1) * sampler.size)]


# ---- TrainingSampler


def test_every_epoch_contains_every_index_once():
    for size in [*range(1, 130), *AWKWARD]:
        sampler = TrainingSampler(size, seed=size)
        for epoch in (0, 1):
            assert sorted(_epoch(sampler, epoch)) == list(range(size)), (size, epoch)


def test_the_index_is_a_function_of_seed_and_position():
    positions = np.random.default_rng(0).integers(0, 10_000, 300).tolist()
    straight = [TrainingSampler(97, seed=5).index_at(p) for p in positions]
    one_sampler = TrainingSampler(97, seed=5)
    backwards = [one_sampler.index_at(p) for p in reversed(positions)][::-1]
    assert backwards == straight


def test_epochs_and_seeds_have_orders_of_their_own():
    """Two random permutations of 1000 agree in one place on average; 10 has a chance of 1e-7."""
    orders = [_epoch(TrainingSampler(1000, seed), epoch) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)]
    for i in range(len(orders)):
        for j in range(i):
            assert sum(a == b for a, b in zip(orders[i], orders[j], strict=True)) < 10
    identity = list(range(1000))
    assert all(sum(a == b for a, b in zip(order, identity, strict=True)) < 10 for order in orders)


@pytest.mark.parametrize("many", ["seeds", "epochs"])
@pytest.mark.parametrize("size", [3, 6, 10, 17])
def test_each_index_is_equally_likely_at_each_place(size: int, many: str):
    runs = 1500
    samplers = [TrainingSampler(size, seed) for seed in range(runs if many == "seeds" else 1)]
    counts = np.zeros((size, size))
    for run in range(runs):
        order = _epoch(samplers[run], 0) if many == "seeds" else _epoch(samplers[0], run)
        counts[np.arange(size), order] += 1
    expected = runs / size
    # The counts of random permutation matrices, so scaled, are chi-square with (size - 1)^2 degrees of freedom.
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    freedom = (size - 1) ** 2
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_all_orders_of_three_and_all_first_pairs_of_six_are_equally_likely():
    orders = Counter(tuple(_epoch(TrainingSampler(3, seed), 0)) for seed in range(3000))
    pairs = Counter((s.index_at(0), s.index_at(1)) for s in (TrainingSampler(6, seed) for seed in range(3000)))
    for counts, kinds in ((orders, 6), (pairs, 30)):
        assert len(counts) == kinds
        expected = 3000 / kinds
        statistic = sum((n - expected) ** 2 / expected for n in counts.values())
        assert statistic < (kinds - 1) + 5 * (2 * (kinds - 1)) ** 0.5


def test_a_billion_images_need_no_memory_and_are_well_mixed():
    tracemalloc.start()
    sampler = TrainingSampler(10**9, seed=0)
    indices = np.array([sampler.index_at(7 * 10**9 + p) for p in range(4000)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(np.unique(indices)) == 4000
    assert indices.min() >= 0
    assert indices.max() < 10**9
    assert indices.mean() / 1e9 == pytest.approx(0.5, abs=0.025)  # 5 standard deviations
    assert abs(np.corrcoef(indices[1:], indices[:-1])[0, 1]) < 0.08
    low_bits = np.bincount(indices % 16, minlength=16)
    assert ((low_bits - 250) ** 2 / 250).sum() < 15 + 5 * 30**0.5


def test_without_shuffling_the_order_is_that_of_the_dataset():
    assert [TrainingSampler(3, seed=9, shuffle=False).index_at(p) for p in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("size", [0, -1])
def test_a_dataset_without_images_is_refused(size: int):
    with pytest.raises(ValueError, match=f"at least one image, got size {size}"):
        TrainingSampler(size, seed=0)


# ---- PositionBatches


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_walk_through_all_positions_in_order(world_size: int):
    ranks = [PositionBatches(8, rank=r, world_size=world_size) for r in range(world_size)]
    for iteration, parts in enumerate(islice(zip(*ranks, strict=True), 10)):
        assert {len(part) for part in parts} == {8 // world_size}
        assert list(chain(*parts)) == list(range(8 * iteration, 8 * iteration + 8))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [5, 8, 24, 27])
def test_every_image_once_per_epoch_whatever_the_number_of_ranks(size: int, world_size: int):
    """Also when the batch does not divide the dataset: the tail of an epoch shares a batch with the next one."""
    sampler = TrainingSampler(size, seed=1)
    ranks = [PositionBatches(8, rank=r, world_size=world_size) for r in range(world_size)]
    stream = [sampler.index_at(p) for parts in islice(zip(*ranks, strict=True), size) for part in parts for p in part]
    epochs = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("start_iter", [1, 3, 10])
def test_a_resumed_stream_is_the_rest_of_the_stream(start_iter: int, world_size: int):
    rank = world_size - 1
    whole = islice(PositionBatches(16, rank=rank, world_size=world_size), start_iter + 5)
    resumed = islice(PositionBatches(16, rank=rank, world_size=world_size, start_iter=start_iter), 5)
    assert list(whole)[start_iter:] == list(resumed)


def test_a_second_walk_starts_where_the_first_did():
    batches = PositionBatches(4, start_iter=2)
    first = list(islice(batches, 3))
    assert first[0] == [8, 9, 10, 11]
    assert list(islice(batches, 3)) == first


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 10 is global and must be divisible by the 4 proc"):
        PositionBatches(10, rank=0, world_size=4)


# ---- InferenceSampler


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 100, 101])
def test_inference_shards_are_contiguous_and_exact(size: int, world_size: int):
    shards = [InferenceSampler(size, rank=r, world_size=world_size) for r in range(world_size)]
    indices = [list(shard) for shard in shards]
    assert list(chain(*indices)) == list(range(size))
    lengths = [len(shard) for shard in shards]
    assert lengths == [len(i) for i in indices]
    assert max(lengths) - min(lengths) <= 1
    assert [list(shard) for shard in shards] == indices  # a second epoch is the same


# ---- mixtures


def _sources(sampler: MixtureSampler, positions: range) -> list[int]:
    return [sampler.source_at(p)[0] for p in positions]


def test_each_source_is_gone_through_in_passes_of_its_own() -> None:
    sizes, offsets = (5, 1, 40), (0, 5, 6)
    sampler = MixtureSampler(sizes, (2, 1, 1), seed=3)
    drawn: list[list[int]] = [[], [], []]
    passes: list[dict[int, list[int]]] = [{}, {}, {}]
    for position in range(4000):
        source, draw = sampler.source_at(position)
        index = sampler.index_at(position)
        assert offsets[source] <= index < offsets[source] + sizes[source]
        drawn[source].append(draw)
        passes[source].setdefault(draw // sizes[source], []).append(index)
    assert all(draws == list(range(len(draws))) for draws in drawn)  # one after the other
    for source, size in enumerate(sizes):  # and so no image twice in a pass
        assert all(len(set(images)) == len(images) <= size for images in passes[source].values())
    assert len({tuple(images) for images in passes[0].values() if len(images) == 5}) > 1  # reshuffled


@pytest.mark.parametrize("weights", [(1, 1), (0.9, 0.1), (3, 1, 4, 1, 5), (1e-4, 1.0)])
def test_every_block_holds_the_shares_and_draws_follow_without_gap(weights: tuple[float, ...]) -> None:
    sampler = MixtureSampler([7] * len(weights), weights, seed=1)
    block = MixtureSampler.BLOCK
    first = [sampler.source_at(p) for p in range(block)]
    for source, weight in enumerate(weights):
        draws = sorted(draw for which, draw in first if which == source)
        assert draws == list(range(len(draws)))
        assert abs(len(draws) - block * weight / sum(weights)) <= 1
        later = {draw for which, draw in (sampler.source_at(p) for p in range(block, block + 500)) if which == source}
        assert all(
            len(draws) <= draw < 2 * len(draws) for draw in later
        )  # the second block goes on where the first ended


def test_a_short_stretch_is_mixed_too() -> None:
    share = sum(_sources(MixtureSampler((10, 10), (3, 1), seed=0), range(2000))) / 2000
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5  # four standard deviations of independent draws


def test_a_mixture_depends_on_seed_and_position_alone() -> None:
    positions = [0, 65_535, 65_536, 10**12, 7]
    first = [MixtureSampler((10**9, 3), (1, 2), seed=5).index_at(p) for p in positions]
    sampler = MixtureSampler((10**9, 3), (100, 200), seed=5)  # weights have any unit
    assert [sampler.index_at(p) for p in reversed(positions)] == first[::-1]
    assert [MixtureSampler((10**9, 3), (1, 2), seed=6).index_at(p) for p in positions] != first


@pytest.mark.parametrize(
    "sizes, weights, message",
    [
        ((3, 3), (1,), "a weight for each source, got 1 for 2"),
        ((), (), "a weight for each source"),
        ((3, 3), (1, 0), r"positive numbers, got \[1, 0\]"),
        ((3, 3), (1, float("nan")), "positive numbers"),
        ((3, 3), (1, 1e-9), r"less than 1 / 65536 of all"),
        ((3, 0), (1, 1), "at least one image"),
    ],
)
def test_wrong_mixtures_are_refused(sizes: tuple[int, ...], weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSampler(sizes, weights, seed=0)
