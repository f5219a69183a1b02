"""How long each stage of the training loader takes alone, and what the loader gives as a whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from dinoengine.config import CfgNode
from dinoengine.data.build import build_train_loader
from dinoengine.data.channels import Channels
from dinoengine.data.decode import is_machine_fault, read_image_bytes
from dinoengine.data.decoded_batch import DecodedBatch
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.data.reduced_decode import whole_size
from dinoengine.utils.printable import printable

READ, DECODE, AUGMENT, COLLATE, TRANSFER = "read", "decode", "augment", "collate", "transfer"
DEVICE_CROPS = "crops on the device"
# Not the workers' work.
OF_THE_DEVICE = (TRANSFER, DEVICE_CROPS)
_FAST = "augment fast"
_NUM_BATCHES = 3
# A batch of thousands of images would be gigabytes of crops, to learn the same.
_MOST_COLLATED = 256

Result = TypeVar("Result")


class StageTimes(NamedTuple):
    """Seconds per image in one process; stages of the workers in the order in which they work.

    Attributes:
        seconds: stage -> seconds per image. "read" is missing where images have no files of their own, and then belongs to
            "decode"; "transfer", pinning and copying to the device, is there on CUDA alone; "crops on the device" with
            INPUT.AUGMENTATION_BACKEND device, where "augment" is drawing recipes. These two are not the workers' work.
        augment_fast: "augment" with INPUT.AUGMENTATION_BACKEND fast; None if not "reference" is set, or it cannot be tried.
        megabytes: per image, of the files; 0 without files.
        shorter_side: mean of the images' shorter side, in pixels.
        num_images: that were timed.
        num_bad: that could not be loaded, and are not counted.
        device: "cpu" or "cuda", for the stages that are its work.
    """

    seconds: dict[str, float]
    augment_fast: float | None
    megabytes: float
    shorter_side: float
    num_images: int
    num_bad: int
    device: str = "cpu"

    @property
    def worker_seconds(self) -> float:
        """Seconds of one worker per image."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage not in OF_THE_DEVICE)


def time_stages(cfg: CfgNode, num_images: int, world_size: int = 1) -> StageTimes:
    """Time each stage, in this process and one thread, on the first images of the training stream.

    A file is dropped from the page cache first where the system allows it, so that "read" is the storage.

    Args:
        cfg: its loader is timed; MODEL.DEVICE "cuda" or "cpu".
        world_size: processes that share the batch; this one is the first.

    Raises:
        ValueError, KeyError, FileNotFoundError: see ``build_train_loader``.
        ValueError: if no image can be loaded.
    """
    loader: Any = build_train_loader(_changed(cfg, "DATALOADER.NUM_WORKERS", 0), rank=0, world_size=world_size)
    # A classifier's stream is around the one that makes crops.
    stream = getattr(loader.dataset, "stream", loader.dataset)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = _time_images(stream, _fast(cfg, stream.augmentation), num_images)
        per_rank = min(_MOST_COLLATED, cfg.SOLVER.IMS_PER_BATCH // world_size)
        some = [loader.dataset[position] for position in timed.good[:per_rank]]
        samples = (some * (per_rank // len(some) + 1))[:per_rank]
        _time_batch(_Watch(), cfg, loader, samples)  # the first one pays for loading the libraries of the device
        watch = _Watch()
        for _ in range(_NUM_BATCHES):
            _time_batch(watch, cfg, loader, samples)
    finally:
        torch.set_num_threads(num_threads)
    per_image = {stage: total / len(timed.good) for stage, total in timed.watch.totals.items()}
    fast = per_image.pop(_FAST, None)
    per_image |= {stage: total / (_NUM_BATCHES * per_rank) for stage, total in watch.totals.items()}
    return StageTimes(
        per_image,
        augment_fast=fast,
        megabytes=timed.num_bytes / num_images / 1e6,
        shorter_side=timed.sides / len(timed.good),
        num_images=num_images,
        num_bad=num_images - len(timed.good),
        device=cfg.MODEL.DEVICE,
    )


def _time_batch(watch: _Watch, cfg: CfgNode, loader: Any, samples: list[Any]) -> None:
    batch = watch.time(COLLATE, loader.collate_fn, samples)
    if cfg.MODEL.DEVICE == "cuda":
        batch = watch.time(TRANSFER, _to_device, batch)
    if isinstance(batch, DecodedBatch):
        watch.time(DEVICE_CROPS, _with_crops, batch)


class _Watch:
    """Seconds of each stage; a call that fails adds none."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}

    def time(self, stage: str, work: Callable[..., Result], *args: Any) -> Result:
        start = time.perf_counter()
        result = work(*args)
        self.totals[stage] = self.totals.get(stage, 0.0) + time.perf_counter() - start
        return result


class _Timed(NamedTuple):
    watch: _Watch
    good: list[int]
    num_bytes: int
    sides: float


def _time_images(stream: Any, fast: Any, num_images: int) -> _Timed:
    """Image after image, as a worker does it: all of them at once would need their memory at once."""
    dataset, watch = stream.dataset, _Watch()
    has_arrays = isinstance(stream.augmentation.image_format, Channels)  # read by the dataset, as one stage
    good: list[int] = []
    num_bytes, sides = 0, 0.0
    for position in range(num_images):
        index = stream.index_at(position)
        path = dataset.path(index)
        try:
            if path is not None and os.path.isfile(path) and not has_arrays:
                _drop_from_cache(path)
                data = watch.time(READ, _read, path)
                num_bytes += len(data)
                with stream.reading(position):
                    image = watch.time(DECODE, read_image_bytes, data, path)
            else:
                with stream.reading(position):
                    image = watch.time(DECODE, dataset.load, index)
        except Exception as error:  # the training replaces it; here it is counted
            if is_machine_fault(error):
                raise
            continue
        if not good:  # libraries are loaded at the first call
            stream.augmentation(image, position_rng(stream.seed, position, CROPS))
        watch.time(AUGMENT, stream.augmentation, image, position_rng(stream.seed, position, CROPS))
        if fast is not None:
            watch.time(_FAST, fast, image, position_rng(stream.seed, position, CROPS))
        good.append(position)
        sides += min(whole_size(image)[0])
    if not good:
        first = printable(dataset.describe(stream.index_at(0)))
        raise ValueError(f"None of the first {num_images} images can be loaded, the first is {first}.")
    return _Timed(watch, good, num_bytes, sides)


def loader_rate(cfg: CfgNode, num_batches: int, world_size: int = 1) -> float:
    """Images per second of the whole loader with its workers, without anything that takes the batches.

    The batches that the workers made before the clock starts are not counted. With INPUT.AUGMENTATION_BACKEND device these
    are decoded images; making their crops is not part of it.
    """
    if cfg.DATALOADER.NUM_WORKERS and num_batches <= cfg.DATALOADER.NUM_WORKERS:
        num_batches = cfg.DATALOADER.NUM_WORKERS + 1  # batches come in bunches of one per worker
    loader = build_train_loader(cfg, rank=0, world_size=world_size, replace_bad_images=True)
    batches = iter(loader)
    for _ in range(1 + cfg.DATALOADER.NUM_WORKERS * cfg.DATALOADER.PREFETCH_FACTOR):
        next(batches)
    start = time.perf_counter()
    num_images = sum(len(next(batches)) for _ in range(num_batches))
    return num_images / (time.perf_counter() - start)


def _changed(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    return cfg


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _drop_from_cache(path: str) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _fast(cfg: CfgNode, augmentation: Any) -> Any:
    """The same augmentation with the fast backend; None if it does not have the reference one, or OpenCV is missing."""
    if getattr(augmentation, "backend", "") != "reference":
        return None
    try:
        return type(augmentation)(_changed(cfg, "INPUT.AUGMENTATION_BACKEND", "fast"))
    except ModuleNotFoundError:
        return None


def _to_device(batch: Any) -> Any:
    pinned = batch.pin_memory()
    copy = pinned.copied_to if isinstance(pinned, DecodedBatch) else pinned.to
    on_device = copy("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return on_device


def _with_crops(batch: DecodedBatch) -> Any:
    made = batch.with_crops()
    if batch.tables.pixels.is_cuda:
        torch.cuda.synchronize()
    return made
