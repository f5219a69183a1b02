"""Loaders from a config."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dinoengine.config import CfgNode
from dinoengine.data.augmentation import AUGMENTATION_REGISTRY, CenterCropTransform
from dinoengine.data.catalog import build_datasets
from dinoengine.data.channels import image_format, num_array_channels
from dinoengine.data.collate import LabelledImage, SSLCollate, collate_images
from dinoengine.data.dataset import ConcatImageDataset, DataError, ImageDataset, require_labels
from dinoengine.data.mask_crops import MaskCrop, MaskStream
from dinoengine.data.masking import BlockMasking, MaskPlan
from dinoengine.data.quarantine import without_quarantined
from dinoengine.data.samplers import (
    InferenceSampler,
    MixtureSampler,
    PositionBatches,
    PositionSampler,
    TrainingSampler,
)
from dinoengine.data.streams import NUM_REPLACEMENTS, LabelledStream, TrainingStream
from dinoengine.data.uneven_samplers import ClassBalancedSampler, WeightedSampler, read_sample_weights
from dinoengine.utils import comm
from dinoengine.utils.printable import printable


class EvaluationImages(Dataset[LabelledImage]):
    """index -> evaluation crop, label and mask."""

    def __init__(self, dataset: ImageDataset, transform: CenterCropTransform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> LabelledImage:
        try:
            image, mask = self.transform(self.dataset.load(index)), self.dataset.load_mask(index)
            cropped_mask = None if mask is None else self.transform.mask(mask)
            return LabelledImage(image, self.dataset.label(index), index, cropped_mask)
        except Exception as error:
            raise DataError(f"Loading or cropping {printable(self.dataset.describe(index))} failed: {error}") from error


def build_mask_plan(cfg: CfgNode) -> MaskPlan | None:
    """The masks INPUT.MASK asks for; None when the iBOT loss is off."""
    if cfg.MODEL.LOSS.IBOT_WEIGHT == 0:
        return None
    size, patch = cfg.INPUT.GLOBAL_CROPS.SIZE_PX, cfg.MODEL.VIT.PATCH_SIZE_PX
    masking = BlockMasking(
        (size[0] // patch, size[-1] // patch), cfg.INPUT.MASK.MIN_BLOCK_PATCHES, cfg.INPUT.MASK.MIN_ASPECT
    )
    return MaskPlan(
        masking,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        crop_share=cfg.INPUT.MASK.CROP_SHARE,
        ratio=cfg.INPUT.MASK.RATIO,
    )


def build_train_loader(
    cfg: CfgNode,
    start_iter: int = 0,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    replace_bad_images: bool = False,
) -> DataLoader[Any]:
    """An endless loader of SSLBatch, for a classifier of ImageBatch, beginning with the batch of iteration ``start_iter``.

    Args:
        rank, world_size: default to those of the process group.
        replace_bad_images: an image that cannot be loaded is replaced and named in ``bad_images`` of its batch, which
            somebody has to look at (``hooks.BadImageLog``); False: it is an error.

    Raises:
        ValueError, KeyError, FileNotFoundError: if a dataset cannot be made, the batch cannot be divided, SEED is -1, or a
            dataset has not the classes of the classifier.
    """
    if cfg.SEED < 0:
        raise ValueError(f"A training loader needs a seed >= 0, got SEED {cfg.SEED}; default_setup draws one for -1.")
    dataset = without_quarantined(build_datasets(cfg.DATASETS.TRAIN), cfg.DATASETS.QUARANTINE)
    _set_reading(dataset, cfg)
    num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    if num_classes:
        require_labels(dataset, num_classes, f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)}")
    sampler = _training_sampler(cfg, dataset)
    augmentation = AUGMENTATION_REGISTRY.get(cfg.INPUT.AUGMENTATION)(cfg)
    stream = TrainingStream(dataset, sampler, augmentation, cfg.SEED, NUM_REPLACEMENTS if replace_bad_images else 0)
    batches = PositionBatches(
        cfg.SOLVER.IMS_PER_BATCH,
        rank=comm.get_rank() if rank is None else rank,
        world_size=comm.get_world_size() if world_size is None else world_size,
        start_iter=start_iter,
    )
    return DataLoader(
        LabelledStream(stream) if num_classes else stream,
        batch_sampler=batches,
        collate_fn=collate_images if num_classes else SSLCollate(build_mask_plan(cfg)),
        timeout=cfg.DATALOADER.TIMEOUT_SECONDS if cfg.DATALOADER.NUM_WORKERS else 0,
        **_worker_options(cfg),
    )


def _set_reading(dataset: ImageDataset, cfg: CfgNode) -> None:
    dataset.limit_pixels(cfg.DATALOADER.MAX_IMAGE_PIXELS)
    dataset.load_channels(num_array_channels(image_format(cfg)))


def _training_sampler(cfg: CfgNode, dataset: ImageDataset) -> PositionSampler:
    if cfg.DATALOADER.SAMPLER == "class_balanced":
        if dataset.class_names is None:
            raise ValueError(
                f"DATALOADER.SAMPLER class_balanced needs labels, and DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} has none "
                "(several datasets have labels together only if they have the same classes)."
            )
        return ClassBalancedSampler(dataset.labels(), cfg.SEED)
    if cfg.DATALOADER.SAMPLER == "weighted":
        return WeightedSampler(read_sample_weights(cfg.DATALOADER.SAMPLE_WEIGHTS, len(dataset)), cfg.SEED)
    weights = cfg.DATASETS.TRAIN_WEIGHTS
    if not weights or not isinstance(dataset, ConcatImageDataset):
        return TrainingSampler(len(dataset), cfg.SEED)
    return MixtureSampler([len(source) for source in dataset.datasets], weights, cfg.SEED)


def build_test_loader(
    cfg: CfgNode, dataset_strings: str | Iterable[str], *, images: Sequence[int] | None = None
) -> DataLoader[Any]:
    """A loader of ImageBatch over this rank's part of a dataset: each image once, in order, none padded.

    Args:
        images: of the dataset, to be divided among the ranks; None: all.
    """
    strings = (dataset_strings,) if isinstance(dataset_strings, str) else tuple(dataset_strings)
    dataset = build_datasets(strings)
    _set_reading(dataset, cfg)
    crop = cfg.INPUT.TEST.CROP_SIZE_PX
    transform = CenterCropTransform(image_format(cfg), cfg.INPUT.TEST.RESIZE_PX, (crop[0], crop[-1]))
    world_size = comm.get_world_size()
    part = InferenceSampler(len(dataset if images is None else images), rank=comm.get_rank(), world_size=world_size)
    return DataLoader(
        EvaluationImages(dataset, transform),
        batch_size=max(1, cfg.TEST.IMS_PER_BATCH // world_size),
        sampler=part if images is None else [images[i] for i in part],
        collate_fn=collate_images,
        **_worker_options(cfg),
    )


def build_mask_train_loader(
    cfg: CfgNode,
    dataset: ImageDataset,
    *,
    batch_size: int,
    resize_ratio: tuple[float, float],
    hflip_prob: float,
    seed: int,
) -> DataLoader[Any]:
    """An endless loader of ImageBatch with masks: random crops of the size of the evaluation crop.

    Args:
        dataset: one with masks.
        batch_size: over all processes.
        resize_ratio, hflip_prob: see ``MaskCrop``.

    Raises:
        ValueError: if the batch cannot be divided over the processes.
    """
    _set_reading(dataset, cfg)
    size = cfg.INPUT.TEST.CROP_SIZE_PX
    crop = MaskCrop(
        image_format(cfg),
        resize_px=cfg.INPUT.TEST.RESIZE_PX,
        crop_size=(size[0], size[-1]),
        resize_ratio=resize_ratio,
        hflip_prob=hflip_prob,
    )
    return DataLoader(
        MaskStream(dataset, TrainingSampler(len(dataset), seed), crop, seed),
        batch_sampler=PositionBatches(batch_size, rank=comm.get_rank(), world_size=comm.get_world_size()),
        collate_fn=collate_images,
        **_worker_options(cfg),
    )


def _worker_options(cfg: CfgNode) -> dict[str, Any]:
    num_workers = cfg.DATALOADER.NUM_WORKERS
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": cfg.MODEL.DEVICE == "cuda"}
    if num_workers:
        _end_workers_at_exit()
        options |= {
            "prefetch_factor": cfg.DATALOADER.PREFETCH_FACTOR,
            "worker_init_fn": init_worker,
        }
    return options


_ends_workers_of = 0  # the process that has been told to; a fork of it has not


def _end_workers_at_exit() -> None:
    """multiprocessing asks each worker once to end when this process does, and then waits for it, however long. Ours do not
    listen to the first SIGTERM, so a training that ends in an error would hang."""
    global _ends_workers_of
    if _ends_workers_of != os.getpid():
        _ends_workers_of = os.getpid()
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def init_worker(worker_id: int) -> None:
    """What a worker process does first: one thread, and signals are the main process's business."""
    # Workers share the cores with each other and with the training process; each works on one image at a time.
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_trainer, name="trainer-watch", daemon=True).start()
    _leave_signals_to_the_trainer()


def _end_with_the_trainer() -> None:
    """Of a trainer that is killed no worker stays behind. torch's workers watch their parent for that, which is not the
    trainer but a server that outlives it where processes start by "forkserver", Python's default since 3.14."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "this is no worker"
    trainer.join()
    os._exit(1)


def _leave_signals_to_the_trainer() -> None:
    """Ctrl-C and many schedulers signal every process of a run; the training one needs its workers to end well.

    A second SIGTERM ends a worker: that is how a worker that hangs is ended. One whose trainer has died ends by itself.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
