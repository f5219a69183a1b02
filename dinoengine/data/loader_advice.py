"""What to change about a loader that is too slow, from the times of its stages."""

from __future__ import annotations

import math
from typing import NamedTuple

from dinoengine.data.loader_timing import (
    AUGMENT,
    COLLATE,
    DECODE,
    DEVICE_CROPS,
    OF_THE_DEVICE,
    READ,
    TRANSFER,
    StageTimes,
)

# Less than this share of what the stages promise: the workers hold each other up.
_LOW_SHARE = 0.7
# What makes the crops of backend "device", and what that says of a training.
_DEVICES = {
    "cpu": "CPU, where this was timed; a GPU makes them beside its steps.",
    "cuda": "GPU, beside its steps.",
}
# A loader that is only just fast enough makes the device wait now and then.
_MARGIN = 1.1


class Situation(NamedTuple):
    """What the advice depends on besides the times.

    Attributes:
        measured: images per second of the whole loader of one process.
        wanted: images per second that its device takes; 0 if that is not known.
        num_workers: of one process.
        num_processes: on this machine, each with its workers.
        num_cores: of the machine.
        crop_side: of the largest crop, in pixels.
    """

    measured: float
    wanted: float
    num_workers: int
    num_processes: int
    num_cores: int
    crop_side: int


def rows_of(times: StageTimes) -> list[tuple[str, float, float, str]]:
    """(stage, milliseconds per image, images per second of one process, share of a worker's time) for a table."""
    rows = []
    for stage, seconds in times.seconds.items():
        share = "" if stage in OF_THE_DEVICE else f"{seconds / times.worker_seconds:.0%}"
        rows.append((stage, 1000 * seconds, _rate(seconds), share))
        if stage == AUGMENT and times.augment_fast is not None:
            rows.append(("  with the backend fast", 1000 * times.augment_fast, _rate(times.augment_fast), ""))
    return rows


def expected_rate(times: StageTimes, situation: Situation) -> float:
    """Images per second that the stages alone would allow the workers of one process; no more work at once than cores."""
    busy = min(max(1, situation.num_workers), max(1, situation.num_cores // situation.num_processes))
    return busy / times.worker_seconds


def advise(times: StageTimes, situation: Situation) -> list[str]:
    """What is the bottleneck and what to do about it, a sentence or two each."""
    slowest = max(
        (stage for stage in times.seconds if stage not in OF_THE_DEVICE), key=lambda stage: times.seconds[stage]
    )
    share = times.seconds[slowest] / times.worker_seconds
    lines = [f"Most of a worker's time is spent on: {slowest} ({share:.0%})."]
    expected = expected_rate(times, situation)
    if situation.measured < _LOW_SHARE * expected:
        lines.append(
            f"The whole loader gives {situation.measured:.0f} images/s where its stages alone would allow {expected:.0f}: "
            "something else uses the cores or the storage, or handing batches over takes long (large batches, little "
            "/dev/shm). Measure again on a quiet machine."
        )
    if times.num_bad:
        lines.append(
            f"{times.num_bad} of {times.num_images} images could not be loaded; tools/check_dataset.py lists such images."
        )
    if DEVICE_CROPS in times.seconds:
        lines.append(
            "The loader's rate is that of decoded images. Their crops take "
            f"{1000 * times.seconds[DEVICE_CROPS]:.2f} ms per image on the {_DEVICES[times.device]}"
        )
    if not situation.wanted:
        lines.append("Give --images-per-second what the device takes, to learn whether this is enough.")
        return lines
    if situation.measured >= _MARGIN * situation.wanted:
        return [*lines, f"Fast enough: the device takes {situation.wanted:.0f} images/s. Nothing needs to change."]
    lines.append(
        f"Too slow: the device takes {situation.wanted:.0f} images/s, the loader gives {situation.measured:.0f}. "
        "What helps, first what costs least:"
    )
    return lines + [f"  - {line}" for line in _remedies(times, situation, slowest)]


def _remedies(times: StageTimes, situation: Situation, slowest: str) -> list[str]:
    lines = []
    workers = _workers_for(times.worker_seconds, situation)
    has_cores = workers * situation.num_processes <= situation.num_cores
    if has_cores and workers > situation.num_workers:
        lines.append(f"DATALOADER.NUM_WORKERS {workers}, for which there are cores ({_cores(situation)}).")
    if times.augment_fast is not None and times.augment_fast < 0.9 * times.seconds[AUGMENT]:
        seconds = times.worker_seconds - times.seconds[AUGMENT] + times.augment_fast
        lines.append(
            f"INPUT.AUGMENTATION_BACKEND fast: {times.worker_seconds / seconds:.1f} times as many images per worker, so "
            f"{_workers_for(seconds, situation)} workers are enough. Pixels differ by rounding (docs/numerics.md)."
        )
    # Twice the crop is what is left of an image of which a crop takes a quarter.
    if times.shorter_side > 2 * situation.crop_side and slowest in (READ, DECODE):
        lines.append(
            f"Smaller images: their shorter side has {times.shorter_side:.0f} pixels on average, and crops have "
            f"{situation.crop_side}. A copy with a shorter side of {2 * situation.crop_side} pixels is read and decoded "
            "in a fraction of the time; very small crops of it are less sharp."
        )
    if READ in times.seconds and (slowest == READ or times.seconds[READ] > times.seconds[DECODE]):
        rate = times.megabytes / times.seconds[READ]
        lines.append(
            f"Another storage: it gives a single reader {rate:.0f} MB/s ({1000 * times.seconds[READ]:.1f} ms per file). A "
            "local disk, or shards (wds:...) where many small files are slow. More workers than cores help too: they wait."
        )
    less = "fewer or smaller crops"
    if DEVICE_CROPS in times.seconds:
        less = (
            "smaller images (INPUT.REDUCED_DECODE for large JPEGs, or smaller files), which is what a batch is made of"
        )
    if slowest == COLLATE:
        lines.append(
            f"{less.capitalize()}: batches are put together in the workers, and copying takes most of their time."
        )
    transfer = times.seconds.get(TRANSFER, 0.0)
    if transfer * situation.wanted > 1:
        lines.append(
            f"The copy to the device alone takes {1000 * transfer:.2f} ms per image, more than the device's pace allows: "
            f"{less}, or a machine with a faster link."
        )
    if not has_cores and slowest == AUGMENT and TRANSFER in times.seconds and DEVICE_CROPS not in times.seconds:
        lines.append(
            "INPUT.AUGMENTATION_BACKEND device, for pictures of 8 bits: the workers only decode, and the GPU makes the "
            "crops beside its steps, which then take longer (docs/data.md)."
        )
    if not has_cores:
        lines.append(
            f"More cores: as it is, {workers} workers would be needed, and there are {_cores(situation)}. Workers beyond "
            "the cores do not help unless they wait for storage."
        )
    return lines or [
        "Nothing that these times show: the stages are fast enough, so look at what else runs on the machine."
    ]


def _workers_for(seconds: float, situation: Situation) -> int:
    return max(1, math.ceil(_MARGIN * situation.wanted * seconds))


def _cores(situation: Situation) -> str:
    shared = f" for {situation.num_processes} processes" if situation.num_processes > 1 else ""
    return f"{situation.num_cores} cores{shared}"


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds else math.inf
