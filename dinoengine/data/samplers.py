"""Which sample stands at which position: pure functions, no stored permutation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from dinoengine.utils.env import hash_seed

_MASK64 = (1 << 64) - 1
_NUM_ROUNDS = 6
_MIXTURE, _SOURCE = 0x313C, 0x50C3


class PositionSampler(Protocol):
    """Which image stands at which position of a stream; ``size``: positions among which a bad image finds a replacement."""

    size: int

    def index_at(self, position: int) -> int: ...


class TrainingSampler:
    """An infinite stream in which every run of ``size`` positions (an epoch) contains every index once.

    The order of epoch e is a keyed permutation: a Feistel network on the smallest even number of bits that covers
    ``size``, walked until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Looking
    up any position takes O(1) time and memory, for 10 samples as for 10**9.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        """
        Raises:
            ValueError: if ``size`` is not positive.
        """
        if size < 1:
            raise ValueError(f"A sampler needs a dataset of at least one image, got size {size}.")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys: tuple[int, list[int]] = (-1, [])

    def index_at(self, position: int) -> int:
        """Index in 0..size-1 of the sample at ``position`` >= 0."""
        epoch, offset = divmod(position, self.size)
        if not self.shuffle:
            return offset
        if self._keys[0] != epoch:
            self._keys = (epoch, [hash_seed(self.seed, epoch, i) for i in range(_NUM_ROUNDS)])
        index = self._permute(offset)
        while index >= self.size:  # fewer than four turns on average
            index = self._permute(index)
        return index

    def _permute(self, value: int) -> int:
        bits = self._half_bits
        low_mask = (1 << bits) - 1
        left, right = value >> bits, value & low_mask
        for key in self._keys[1]:
            mixed = ((right ^ key) * 0xBF58476D1CE4E5B9) & _MASK64
            mixed = ((mixed ^ (mixed >> 32)) * 0x94D049BB133111EB) & _MASK64
            left, right = right, left ^ ((mixed >> 32) & low_mask)
        return (left << bits) | right


class MixtureSampler:
    """An infinite stream of several sources laid end to end, in which each is drawn from with a weight of its own.

    Which source a position takes is a pure function of (seed, position): of every ``BLOCK`` positions each source has its
    share, to one in ``BLOCK``, at places in random order. The n-th draw from a source is the n-th sample of that source's
    own stream, so each goes through all of its images, reshuffled at every pass, whatever the others do. Looking up any
    position makes one block, some milliseconds, which is kept for those that follow.
    """

    BLOCK = 1 << 16

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """
        Args:
            sizes: images of each source.
            weights: how often each is drawn from, in any unit.

        Raises:
            ValueError: if there are not as many weights as sources, or one is not positive, or below 1 / ``BLOCK`` of all.
        """
        if len(sizes) != len(weights) or not sizes:
            raise ValueError(f"A mixture needs a weight for each source, got {len(weights)} for {len(sizes)} sources.")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"Weights of a mixture are positive numbers, got {list(weights)}.")
        # Replacements of bad images come from the same block.
        self.size, self.seed = self.BLOCK, seed
        total = math.fsum(weights)
        cumulative = [round(self.BLOCK * math.fsum(weights[:end]) / total) for end in range(len(weights) + 1)]
        self._quotas = [end - start for start, end in itertools.pairwise(cumulative)]
        if 0 in self._quotas:
            raise ValueError(f"A weight is less than 1 / {self.BLOCK} of all of them, got {list(weights)}.")
        self._block = (-1, np.empty(0), np.empty(0))
        self._offsets = [0, *itertools.accumulate(sizes)]
        self._sources = [TrainingSampler(size, hash_seed(seed, _SOURCE, k)) for k, size in enumerate(sizes)]

    def source_at(self, position: int) -> tuple[int, int]:
        """(source, how often it was drawn from before) at ``position`` >= 0."""
        block, place = divmod(position, self.BLOCK)
        if self._block[0] != block:
            self._block = (block, *self._deal(block))
        _, sources, ranks = self._block
        source = int(sources[place])
        return source, block * self._quotas[source] + int(ranks[place])

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how often it came before in this block), [BLOCK] each."""
        # Sorted raw numbers: unlike numpy's permutations, the same in all its versions.
        raw = np.random.Philox(hash_seed(self.seed, _MIXTURE, block)).random_raw(self.BLOCK)
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)[np.argsort(raw, kind="stable")]
        ranks = np.empty(self.BLOCK, dtype=np.int64)
        for source, quota in enumerate(self._quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks

    def index_at(self, position: int) -> int:
        """Index of the sample at ``position`` >= 0 among those of all sources."""
        source, draw = self.source_at(position)
        return self._offsets[source] + self._sources[source].index_at(draw)


class PositionBatches(Sampler[list[int]]):
    """The positions each iteration uses on one rank: an endless batch sampler.

    Iteration t of a run with global batch B uses positions t*B .. (t+1)*B - 1; rank r of W takes its contiguous
    part. The stream as a whole therefore does not depend on W.
    """

    def __init__(self, batch_size: int, *, rank: int = 0, world_size: int = 1, start_iter: int = 0) -> None:
        """
        Args:
            batch_size: global.

        Raises:
            ValueError: if it is not divisible by the world size.
        """
        if batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {batch_size} is global and must be divisible by the {world_size} processes."
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.positions_at, itertools.count(self.start_iter))

    def positions_at(self, iteration: int) -> list[int]:
        """What this rank uses in an iteration."""
        per_rank = self.batch_size // self.world_size
        first = iteration * self.batch_size + self.rank * per_rank
        return list(range(first, first + per_rank))


class InferenceSampler(Sampler[int]):
    """Each index once over all ranks, in contiguous parts whose sizes differ by at most one; nothing is padded."""

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.start = size * rank // world_size
        self.end = size * (rank + 1) // world_size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end - self.start
