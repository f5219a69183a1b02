from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from dinoengine.data.random_streams import CROPS, MASK_BLOCKS, MASK_PLAN, position_rng


def test_the_same_arguments_give_the_same_numbers_whatever_was_drawn_before():
    expected = position_rng(3, 14, CROPS, 1).random(5)
    position_rng(3, 13, CROPS, 1).random(100)
    assert np.array_equal(position_rng(3, 14, CROPS, 1).random(5), expected)


def test_every_argument_matters():
    """All combinations, also of values that a sum or an xor of the arguments would confuse, start differently."""
    arguments = list(product((0, 1, 2, 5), (0, 1, 2, 2**33), (CROPS, MASK_BLOCKS, MASK_PLAN), (0, 1, 2)))
    firsts = {position_rng(*a).integers(0, 2**63) for a in arguments}
    assert len(firsts) == len(arguments)


def test_numbers_are_independent_between_neighbours():
    draws = np.array([position_rng(0, p, CROPS).random(3) for p in range(3000)])  # [positions, draws]
    other = np.array([position_rng(0, p, MASK_BLOCKS).random(3) for p in range(3000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.015)  # 5 standard deviations of the mean of 9000
    assert draws.var() == pytest.approx(1 / 12, abs=0.004)
    columns = np.concatenate([draws[1:], draws[:-1], other[1:]], axis=1)
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert abs(correlation).max() < 0.09  # 5 / sqrt(3000)


def test_streams_do_not_overlap_in_ten_thousand_draws():
    streams = [position_rng(0, p, CROPS, part).integers(0, 2**63, 10_000) for p in range(3) for part in range(2)]
    assert len(np.unique(np.concatenate(streams))) == 60_000


def test_no_global_generator_is_read_or_moved():
    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    position_rng(0, 0, CROPS).random(10)
    assert states() == before


def test_a_seed_that_was_not_resolved_is_refused():
    with pytest.raises(OverflowError, match="-1"):
        position_rng(-1, 0, CROPS)
