"""Schedules against numbers measured from the published code, and against its array construction."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest

from dinoengine.config import get_cfg
from dinoengine.solver import (
    CosineSchedule,
    FrozenStart,
    LinearWarmupSchedule,
    build_lr_scheduler,
    build_teacher_schedules,
)
from dinoengine.solver.build import OptimizerSchedule
from dinoengine.solver.schedules import RampAfterFreeze, Schedule

# iteration -> value, short recipe (ViT-L/16, global batch 2048), which is the default config.
SHORT_LR = {
    0: 0.0,
    1: 4.526e-7,
    1249: 5.653e-4,
    12500: 5.6569e-3,
    37500: 4.995e-3,
    62500: 3.32e-3,
    100000: 6.626e-4,
}
SHORT_WEIGHT_DECAY = {0: 0.04, 37500: 0.114199, 62500: 0.22, 100000: 0.365623}
SHORT_MOMENTUM = {0: 0.992, 37500: 0.993649, 62500: 0.996, 100000: 0.999236}


def _last_digit(value: float) -> float:
    """Half a unit of the last digit of a value written with four or more significant digits."""
    return 0.5 * 10 ** (math.floor(math.log10(value)) - 3) if value else 0.0


def _short_recipe() -> OptimizerSchedule:
    return build_lr_scheduler(get_cfg(), optimizer=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("iteration", SHORT_LR)
def test_published_lr_of_the_short_recipe(iteration: int) -> None:
    expected = SHORT_LR[iteration]
    assert _short_recipe().lr(iteration) == pytest.approx(expected, rel=0, abs=_last_digit(expected))


@pytest.mark.parametrize("iteration", SHORT_WEIGHT_DECAY)
def test_published_weight_decay_of_the_short_recipe(iteration: int) -> None:
    assert _short_recipe().weight_decay(iteration) == pytest.approx(SHORT_WEIGHT_DECAY[iteration], rel=0, abs=5e-7)


@pytest.mark.parametrize("iteration", SHORT_MOMENTUM)
def test_published_teacher_momentum_of_the_short_recipe(iteration: int) -> None:
    momentum = build_teacher_schedules(get_cfg())["teacher_momentum"]
    assert momentum(iteration) == pytest.approx(SHORT_MOMENTUM[iteration], rel=0, abs=5e-7)


def test_published_values_of_the_vitl14_recipe() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "SOLVER.IMS_PER_BATCH=3072",
            "SOLVER.BASE_LR=2e-4",
            "SOLVER.MAX_ITER=625000",
            "SOLVER.WARMUP_ITERS=100000",
            "SOLVER.WEIGHT_DECAY_END=0.2",
            "MODEL.TEACHER.MOMENTUM=0.994",
        ]
    )
    schedule = build_lr_scheduler(cfg, optimizer=None)  # type: ignore[arg-type]
    assert schedule.lr(100000) == pytest.approx(3.4641e-4, rel=0, abs=5e-9)
    assert schedule.weight_decay(100000) == pytest.approx(0.0498955, rel=0, abs=5e-8)
    assert build_teacher_schedules(cfg)["teacher_momentum"](100000) == pytest.approx(0.994371, rel=0, abs=5e-7)


def test_teacher_temperature_reaches_its_end_and_is_not_stretched_with_the_run() -> None:
    cfg = get_cfg()
    temp = build_teacher_schedules(cfg)["teacher_temp"]
    assert temp(0) == 0.04
    assert temp(37499) == pytest.approx(0.07, rel=1e-12)  # the end of the linspace is included
    assert temp(37500) == temp(10**9) == 0.07
    # np.linspace(0.04, 0.07, 37500)[18750]
    assert temp(18750) == pytest.approx(0.04 + 0.03 * 18750 / 37499, rel=1e-12)
    cfg.SOLVER.MAX_ITER = 10
    assert build_teacher_schedules(cfg)["teacher_temp"](18750) == temp(18750)


def _cosine_array(
    base: float, final: float, total: int, warmup: int, freeze: int, start: float, length: int
) -> np.ndarray:
    """The published construction: three arrays one after the other, then ``final`` for ever."""
    k = np.arange(max(0, total - warmup - freeze))
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * k / max(1, len(k))))
    whole = np.concatenate((np.zeros(freeze), np.linspace(start, base, warmup), cosine))[:total]
    return np.concatenate((whole, np.full(length - len(whole), final)))


@pytest.mark.parametrize("seed", range(40))
def test_cosine_equals_the_array_construction(seed: int) -> None:
    rng = random.Random(seed)
    total = rng.choice([1, 2, 7, 50, 213])
    warmup = rng.choice([0, 1, 2, rng.randrange(total + 1), total, total + 9])
    freeze = rng.choice([0, 0, 1, rng.randrange(total + 1), total + 3])
    base, final, start = (rng.uniform(-1, 2) for _ in range(3))
    schedule = CosineSchedule(base, final, total, warmup_iters=warmup, freeze_iters=freeze, start=start)
    expected = _cosine_array(base, final, total, warmup, freeze, start, total + 5)
    actual = [schedule(i) for i in range(total + 5)]
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 10, 1000])
def test_linear_warmup_equals_numpy_linspace(warmup: int) -> None:
    schedule = LinearWarmupSchedule(0.3, 0.1, warmup)
    expected = np.concatenate((np.linspace(0.3, 0.1, warmup), np.full(5, 0.1)))
    np.testing.assert_allclose([schedule(i) for i in range(warmup + 5)], expected, rtol=1e-12)


def test_cosine_landmarks() -> None:
    schedule = CosineSchedule(2.0, 1.0, 20, warmup_iters=5, freeze_iters=5)
    assert [schedule(i) for i in range(5)] == [0.0] * 5
    assert [schedule(i) for i in range(5, 10)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert schedule(10) == 2.0  # twice: the end of the warm-up and the top of the cosine
    assert schedule(15) == pytest.approx(1.5)  # half-way down
    assert schedule(19) > 1.0
    assert schedule(20) == schedule(10**12) == 1.0


def test_warmup_longer_than_the_run_is_cut_by_its_end() -> None:
    schedule = CosineSchedule(1.0, 0.25, 4, warmup_iters=11)
    assert [schedule(i) for i in range(6)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.25, 0.25])


def test_cosine_never_leaves_the_range_between_base_and_final() -> None:
    schedule = CosineSchedule(0.992, 1.0, 1000)
    values = [schedule(i) for i in range(1100)]
    assert values == sorted(values)
    assert values[0] == 0.992
    assert max(values) == 1.0


def test_frozen_start_blanks_the_first_values_and_does_not_shift_the_rest() -> None:
    base = CosineSchedule(1.0, 0.0, 30, warmup_iters=10)
    frozen = FrozenStart(base, 4)
    assert [frozen(i) for i in range(4)] == [0.0] * 4
    assert [frozen(i) for i in range(4, 40)] == [base(i) for i in range(4, 40)]
    assert frozen(4) == pytest.approx(4 / 9)  # in the middle of the warm-up, not at its start
    assert [FrozenStart(base, 0)(i) for i in range(40)] == [base(i) for i in range(40)]


def test_frozen_start_with_a_freeze_longer_than_the_run_stays_at_zero() -> None:
    frozen = FrozenStart(CosineSchedule(1.0, 0.5, 10), 100)
    assert {frozen(i) for i in range(100)} == {0.0}


def test_last_layer_lr_of_the_short_recipe_starts_at_iteration_1250() -> None:
    schedule = _short_recipe()
    assert schedule.last_layer_lr(1249) == 0.0
    assert schedule.last_layer_lr(1250) == schedule.lr(1250) > 0.0
    assert schedule.last_layer_lr(100000) == schedule.lr(100000)


@pytest.mark.parametrize(
    "schedule",
    [CosineSchedule(1.0, 0.0, 9, warmup_iters=3), LinearWarmupSchedule(0.0, 1.0, 5), FrozenStart(float, 2)],
)
def test_schedules_have_no_state(schedule: Schedule) -> None:
    forward = [schedule(i) for i in range(12)]
    assert [schedule(i) for i in reversed(range(12))] == forward[::-1]
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
        schedule.start = 3.0  # type: ignore[attr-defined]


def test_a_ramp_without_freeze_or_without_ramp() -> None:
    assert [RampAfterFreeze(0, 2)(i) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert [RampAfterFreeze(2, 0)(i) for i in range(4)] == [0.0, 0.0, 1.0, 1.0]
