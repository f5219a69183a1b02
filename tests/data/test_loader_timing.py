"""Stages are timed on what training would load; a stand-in for the clock's subject makes each stage as slow as it says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import DatasetCatalog, ImageDataset, MultiCrop, loader_timing
from dinoengine.data.decoded_batch import DecodedBatch
from dinoengine.data.loader_timing import (
    AUGMENT,
    COLLATE,
    DECODE,
    DEVICE_CROPS,
    READ,
    loader_rate,
    time_stages,
)
from tests.data.pictures import picture


class _Slow(ImageDataset):
    """No files; loading takes 20 ms; the images of odd index are bad."""

    def __len__(self) -> int:
        return 8

    def load(self, index: int) -> Any:
        if index % 2:
            raise RuntimeError("damaged")
        time.sleep(0.02)
        return picture(index)


def _cfg(*overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "DATALOADER.NUM_WORKERS=0",
            "MODEL.DEVICE=cpu",
            "SOLVER.IMS_PER_BATCH=4",
            "INPUT.LOCAL_CROPS.NUM=1",
            *overrides,
        ]
    )
    return cfg


@pytest.fixture
def slow() -> Any:
    DatasetCatalog.register("slow", _Slow)
    yield "slow"
    DatasetCatalog.remove("slow")


def test_stages_are_timed_apart(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = MultiCrop.__call__

    def slower(self: MultiCrop, image: Any, rng: Any) -> Any:
        time.sleep(0.04 if self.backend == "reference" else 0.0)
        return augment(self, image, rng)

    monkeypatch.setattr(MultiCrop, "__call__", slower)
    threads = torch.get_num_threads()
    times = time_stages(_cfg(f"DATASETS.TRAIN={slow}"), 8)
    assert list(times.seconds) == [DECODE, AUGMENT, COLLATE]  # no file to read, no device
    assert times.seconds[DECODE] >= 0.02
    assert times.seconds[AUGMENT] >= 0.04
    assert (times.num_images, times.num_bad, times.megabytes, times.shorter_side) == (8, 4, 0, 150)
    assert times.worker_seconds == sum(times.seconds.values())
    assert times.augment_fast is not None
    assert torch.get_num_threads() == threads


def test_files_are_read_before_they_are_decoded(tmp_path: Path) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    times = time_stages(_cfg(f"DATASETS.TRAIN=folder:{tmp_path}", "INPUT.AUGMENTATION_BACKEND=fast"), 3)
    assert list(times.seconds) == [READ, DECODE, AUGMENT, COLLATE]
    assert times.megabytes == pytest.approx(total / 3 / 1e6)
    assert times.augment_fast is None  # it is what was timed


def test_crops_of_the_device_are_a_stage_that_is_not_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_crops = DecodedBatch.with_crops

    def slower(self: DecodedBatch) -> Any:
        time.sleep(0.04)
        return with_crops(self)

    monkeypatch.setattr(DecodedBatch, "with_crops", slower)
    options = ("DATASETS.TRAIN=synthetic:num_images=4:size=30", "INPUT.AUGMENTATION_BACKEND=device")
    times = time_stages(_cfg(*options), 2)
    assert list(times.seconds) == [DECODE, AUGMENT, COLLATE, DEVICE_CROPS]
    assert times.seconds[DEVICE_CROPS] >= 0.04 / 4
    assert times.worker_seconds == sum(times.seconds[stage] for stage in (DECODE, AUGMENT, COLLATE))
    assert times.augment_fast is None
    assert loader_rate(_cfg(*options), 2) > 0


def test_a_batch_of_one_process_of_several_and_of_a_classifier() -> None:
    options = ("DATASETS.TRAIN=synthetic:num_images=6:num_classes=2:size=30", "INPUT.AUGMENTATION=SingleCrop")
    times = time_stages(_cfg(*options, "MODEL.CLASSIFIER.NUM_CLASSES=2"), 2, world_size=2)
    assert times.seconds[COLLATE] > 0
    assert times.num_bad == 0


def test_nothing_that_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"None of the first 3 images can be loaded, the first is .*1\.png"):
        time_stages(_cfg(f"DATASETS.TRAIN=folder:{tmp_path}"), 3)


def test_the_rate_is_of_images_and_leaves_out_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0])
    loads: list[bool] = []

    def loader(cfg: CfgNode, **options: Any) -> Any:
        loads.append(options["replace_bad_images"])
        return [[0] * 4] * 6

    monkeypatch.setattr(loader_timing, "build_train_loader", loader)
    monkeypatch.setattr("dinoengine.data.loader_timing.time.perf_counter", lambda: next(now))
    assert loader_rate(_cfg(), 5) == 5 * 4 / 2.0
    assert loads == [True]


def test_a_bunch_of_batches_from_each_worker_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        loader_timing, "build_train_loader", lambda cfg, **options: (taken.append(i) or [0] for i in range(99))
    )
    loader_rate(_cfg("DATALOADER.NUM_WORKERS=3", "DATALOADER.PREFETCH_FACTOR=2"), 1)
    assert len(taken) == 1 + 3 * 2 + 4
