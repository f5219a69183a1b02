"""Which sample stands at which position: pure functions, no stored permutation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.utils.data import Sampler

from dinoengine.utils.env import hash_seed

_MASK64 = (1 << 64) - 1
_NUM_ROUNDS = 6


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
