"""Random numbers that belong to a position in the sample stream."""

from __future__ import annotations

import numpy as np

# What the numbers are for; different purposes at one position are independent.
CROPS, MASK_BLOCKS, MASK_PLAN = 1, 2, 3


def position_rng(seed: int, position: int, purpose: int, part: int = 0) -> np.random.Generator:
    """A generator that depends on its arguments alone, whatever process asks and whatever it drew before.

    Philox is counter-based: the arguments go into its key and counter, so making one costs microseconds and two
    never overlap (each has 2**64 blocks of its own).
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, part, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
