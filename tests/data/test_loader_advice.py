"""Advice by rule: each remedy where it helps, and not where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from dinoengine.data.loader_advice import Situation, advise, expected_rate, rows_of
from dinoengine.data.loader_timing import (
    AUGMENT,
    COLLATE,
    DECODE,
    DEVICE_CROPS,
    READ,
    TRANSFER,
    StageTimes,
)


def _times(
    read: float = 1.0, decode: float = 4.0, augment: float = 14.0, collate: float = 1.0, **changes: Any
) -> StageTimes:
    """In ms; 20 in all as they are: 50 images/s per worker."""
    seconds = {READ: read / 1e3, DECODE: decode / 1e3, AUGMENT: augment / 1e3, COLLATE: collate / 1e3}
    return StageTimes(seconds, None, 0.1, 300.0, 64, 0)._replace(**changes)


def _situation(wanted: float, **changes: Any) -> Situation:
    plain = Situation(measured=100.0, wanted=wanted, num_workers=2, num_processes=1, num_cores=8, crop_side=224)
    return plain._replace(**changes)


def _text(times: StageTimes, situation: Situation) -> str:
    return "\n".join(advise(times, situation))


def test_rows_have_shares_of_a_workers_time() -> None:
    times = _times(augment_fast=0.002)
    times.seconds[TRANSFER] = 0.001
    rows = rows_of(times)
    assert [(name, share) for name, _, _, share in rows] == [
        (READ, "5%"), (DECODE, "20%"), (AUGMENT, "70%"), ("  with the backend fast", ""), (COLLATE, "5%"), (TRANSFER, ""),
    ]  # fmt: skip
    assert rows[2][1:3] == (pytest.approx(14.0), pytest.approx(1000 / 14))


@pytest.mark.parametrize(
    ("num_workers", "num_processes", "num_cores", "expected"),
    [(0, 1, 8, 50), (2, 1, 8, 100), (16, 1, 8, 400), (8, 4, 8, 100), (2, 4, 2, 50)],
)
def test_no_more_workers_count_than_cores(
    num_workers: int, num_processes: int, num_cores: int, expected: float
) -> None:
    situation = Situation(0, 0, num_workers, num_processes, num_cores, 224)
    assert expected_rate(_times(), situation) == pytest.approx(expected)


def test_the_slowest_stage_is_named() -> None:
    assert "augment (70%)" in _text(_times(), _situation(0))
    assert "read (" in _text(_times(read=90), _situation(0, measured=20))
    assert "--images-per-second" in _text(_times(), _situation(0))


def test_fast_enough_needs_a_margin() -> None:
    assert "Fast enough" in _text(_times(), _situation(90))
    assert "Too slow" in _text(_times(), _situation(95))


def test_workers_where_there_are_cores() -> None:
    assert "DATALOADER.NUM_WORKERS 7, for which there are cores (8 cores)" in _text(
        _times(), _situation(300)
    )  # 300 * 1.1 * 0.02
    crowded = _text(_times(), _situation(300, num_processes=2))
    assert "DATALOADER.NUM_WORKERS" not in crowded
    assert "More cores: as it is, 7 workers would be needed, and there are 8 cores for 2 processes" in crowded


def test_crops_of_the_device_are_said_to_take_its_time() -> None:
    times = _times()
    times.seconds[DEVICE_CROPS] = 0.0005
    assert [share for name, _, _, share in rows_of(times) if name == DEVICE_CROPS] == [""]
    text = _text(times, _situation(0))
    assert "Their crops take 0.50 ms per image on the CPU, where this was timed" in text
    assert "Their crops take 0.50 ms per image on the GPU, beside its steps." in _text(
        times._replace(device="cuda"), _situation(0)
    )
    assert "Their crops" not in _text(_times(), _situation(0))


def test_crops_on_the_device_where_cores_are_short_and_there_is_one() -> None:
    crowded, advice = _situation(300, num_processes=2), "INPUT.AUGMENTATION_BACKEND device"
    times = _times()
    assert advice not in _text(times, crowded)  # nothing is copied to a device
    times.seconds[TRANSFER] = 0.0001
    assert advice in _text(times, crowded)
    assert advice not in _text(times, _situation(300))  # there are cores
    slow = _times(decode=80)
    slow.seconds[TRANSFER] = 0.0001
    assert advice not in _text(slow, crowded)


def test_the_fast_backend_where_it_is_faster() -> None:
    text = _text(_times(augment_fast=0.004), _situation(300))
    assert "INPUT.AUGMENTATION_BACKEND fast: 2.0 times as many images per worker, so 4 workers are enough" in text
    assert "fast:" not in _text(_times(augment_fast=0.0135), _situation(300))
    assert "fast:" not in _text(_times(), _situation(300))


def test_smaller_images_where_decoding_is_the_most() -> None:
    large = _times(decode=80, shorter_side=2000.0)
    assert "shorter side of 448 pixels" in _text(large, _situation(300, measured=20))
    assert "Smaller images" not in _text(_times(decode=80), _situation(300, measured=20))  # 300 pixels
    assert "Smaller images" not in _text(_times(shorter_side=2000.0), _situation(300))  # augmentation is the most


def test_storage_where_reading_takes_longer_than_decoding() -> None:
    text = _text(_times(read=50.0), _situation(300, measured=30))
    assert "a single reader 2 MB/s (50.0 ms per file)" in text  # 0.1 MB in 50 ms
    assert "Another storage" not in _text(_times(), _situation(300))
    without_files = _times()
    del without_files.seconds[READ]
    assert "Another storage" not in _text(without_files, _situation(300))


def test_a_slow_copy_to_the_device_and_slow_collation() -> None:
    times = _times(collate=30)
    times.seconds[TRANSFER] = 0.005  # 200 images/s
    text = _text(times, _situation(300, measured=30))
    assert "alone takes 5.00 ms per image" in text
    assert "Fewer or smaller crops: batches are put together" in text
    assert "alone takes" not in _text(times, _situation(150, measured=30))


def test_what_the_stages_do_not_explain() -> None:
    text = _text(_times(), _situation(60, measured=40))
    assert "gives 40 images/s where its stages alone would allow 100" in text
    assert "Nothing that these times show" in text
    assert "would allow" not in _text(_times(), _situation(60, measured=90))


def test_bad_images_are_mentioned() -> None:
    assert "3 of 64 images could not be loaded; tools/check_dataset.py" in _text(_times(num_bad=3), _situation(0))


def test_who_has_crops_of_the_device_is_not_told_to_take_them() -> None:
    times = _times()
    times.seconds[TRANSFER] = 0.02
    times.seconds[AUGMENT] = 10 * max(times.seconds.values())
    few_cores = _situation(3000, num_processes=8)
    assert "INPUT.AUGMENTATION_BACKEND device" in _text(times, few_cores)
    assert "fewer or smaller crops, or a machine" in _text(times, few_cores)
    times.seconds[DEVICE_CROPS] = 0.0005
    assert "INPUT.AUGMENTATION_BACKEND device" not in _text(times, few_cores)
    assert "smaller images (INPUT.REDUCED_DECODE for large JPEGs, or smaller files)" in _text(times, few_cores)
