"""Images that look alike, among millions, without comparing each with each.

The hash is that of Zauner ("Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): grey, 32 x 32, DCT,
the signs of the lowest 8 x 8 frequencies about their median. Copies that were scaled, compressed again or made a little
brighter differ in few of its 64 bits; a crop or a mirrored image is another image to it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

HASH_BITS = 64
MAX_DISTANCE = 6
# Images of one bucket that each is compared with. Buckets that hold more are of hashes that say little (blank pages, one
# scene from a camera); to compare all of them would take the square of their number.
MAX_NEIGHBOURS = 4096
_GREY_PX = 32
_FREQUENCIES = 8
_MOST_PAIRS = 4_000_000


class Neighbours(NamedTuple):
    """Pairs of hashes that are near each other.

    Attributes:
        first, second: [pairs] int64, positions of hashes.
        is_complete: False if a bucket was so full that pairs may be missing, or there were so many pairs that some were
            replaced by others that connect the same hashes.
    """

    first: np.ndarray
    second: np.ndarray
    is_complete: bool


def perceptual_hash(grey: Any) -> int:
    """64 bits of a ``PIL.Image`` of mode "L"."""
    from PIL import Image

    small = np.asarray(grey.resize((_GREY_PX, _GREY_PX), Image.Resampling.BOX), dtype=np.float64)
    basis = _cosines()
    frequencies = (basis @ small @ basis.T).ravel()
    # The first is the mean brightness, which is far from all others: it does not count for the median.
    bits = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> np.ndarray:
    """The lowest rows of the DCT-II, [_FREQUENCIES, _GREY_PX]."""
    angles = np.arange(_FREQUENCIES)[:, None] * (np.arange(_GREY_PX) + 0.5) * np.pi / _GREY_PX
    return np.asarray(np.cos(angles))


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number of bits in which hashes differ, [n] uint8; both [n] uint64."""
    words, ones = (first ^ second).view(np.uint16), _ones_of_16_bits()
    return ones[words[0::4]] + ones[words[1::4]] + ones[words[2::4]] + ones[words[3::4]]


@functools.cache
def _ones_of_16_bits() -> np.ndarray:
    numbers = np.arange(1 << 16, dtype=np.uint16)
    return np.unpackbits(numbers.view(np.uint8).reshape(-1, 2), axis=1).sum(axis=1, dtype=np.uint8)


def near_pairs(hashes: np.ndarray, max_distance: int) -> Neighbours:
    """The pairs of hashes that differ in at most so many bits, each once.

    Of hashes that differ in d bits, cut into d // 2 + 1 bands, one band differs in one bit at most: without that bit it is
    equal. So for each of the 64 bits, hashes with the same rest of its band are compared, which for 4 bits and a million
    random hashes is one other each. Memory is that of the hashes and of the pairs found, of which millions are replaced
    by a tree per group of hashes that hang together.

    Args:
        hashes: [n] uint64, each once.
        max_distance: 0 to MAX_DISTANCE.

    Raises:
        ValueError: for another distance.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"Hashes are near at a distance of 0 to {MAX_DISTANCE} bits; got {max_distance}.")
    none = np.empty(0, dtype=np.int64)
    found, num_found, is_complete = [(none, none)], 0, True
    for mask in _bands_without_a_bit(max_distance // 2 + 1):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        ordered = hashes[order]
        for step, start in enumerate(_same_key(keys[order]), start=1):
            is_complete &= step < MAX_NEIGHBOURS
            start = start[distances(ordered[start], ordered[start + step]) <= max_distance]
            if len(start):
                found.append((order[start], order[start + step]))
                num_found += len(start)
            if num_found > _MOST_PAIRS:
                found = [_tree(*_joined(found), len(hashes))]
                # Counted anew: a tree never has more pairs than there are hashes.
                num_found, is_complete = 0, False
    first, second = _joined(found)
    # A pair may meet more than once.
    pairs = np.unique(np.minimum(first, second) * len(hashes) + np.maximum(first, second))
    return Neighbours(pairs // max(1, len(hashes)), pairs % max(1, len(hashes)), is_complete)


def _bands_without_a_bit(num_bands: int) -> Iterator[np.uint64]:
    edges = np.linspace(0, HASH_BITS, num_bands + 1).astype(int).tolist()
    for low, high in itertools.pairwise(edges):
        for bit in range(low, high):
            yield np.uint64(((1 << high) - (1 << low)) & ~(1 << bit))


def _joined(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([first for first, _ in pairs]), np.concatenate([second for _, second in pairs])


def _same_key(ordered: np.ndarray) -> Iterator[np.ndarray]:
    """For steps 1, 2, ... the positions whose key is that of the one so many steps behind.

    As many steps as the fullest bucket has entries, and the late ones are of that bucket alone.
    """
    start = np.arange(len(ordered))
    for step in range(1, MAX_NEIGHBOURS + 1):
        start = start[start + step < len(ordered)]
        start = start[ordered[start] == ordered[start + step]]
        if not len(start):
            return
        yield start


def groups_of(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """[count] int64, the number of the group of each of ``count`` things, of which these pairs belong together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _tree(first: np.ndarray, second: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fewer pairs that connect the same: each thing with the first of its group."""
    groups = groups_of(first, second, count)
    _, leader = np.unique(groups, return_index=True)
    members = np.flatnonzero(leader[groups] != np.arange(count))
    return leader[groups][members], members
