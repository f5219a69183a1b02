from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import (
    AUGMENTATION_REGISTRY,
    CenterCropTransform,
    DataError,
    DatasetCatalog,
    ImageDataset,
    MultiCrop,
    Synthetic,
    TrainingSampler,
    build_test_loader,
    build_train_loader,
)
from dinoengine.data.build import build_mask_plan
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.structures import SSLBatch
from dinoengine.utils import comm

FIELDS = ("global_crops", "local_crops", "masks", "positions")


def _cfg(*overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "DATASETS.TRAIN=synthetic:num_images=11:size=20",
            "DATALOADER.NUM_WORKERS=0",
            "INPUT.GLOBAL_CROPS.SIZE_PX=16",
            "INPUT.LOCAL_CROPS.SIZE_PX=8",
            "INPUT.LOCAL_CROPS.NUM=2",
            "INPUT.TEST.RESIZE_PX=16",
            "INPUT.TEST.CROP_SIZE_PX=16",
            "MODEL.VIT.PATCH_SIZE_PX=4",
            "MODEL.DEVICE=cpu",
            "SOLVER.IMS_PER_BATCH=8",
            "TEST.IMS_PER_BATCH=4",
            *overrides,
        ]
    )
    return cfg


def _batches(cfg: CfgNode, count: int, **options: Any) -> list[SSLBatch]:
    return list(islice(build_train_loader(cfg, **options), count))


def _assert_same(one: SSLBatch, other: SSLBatch) -> None:
    assert (one.num_global_views, one.num_local_views) == (other.num_global_views, other.num_local_views)
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


class Failing(ImageDataset):
    """Two images: the second cannot be loaded, or has a mode that Pillow does not turn into grey."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 2

    def load(self, index: int) -> Image.Image:
        if index == 1 and self.kind == "load":
            raise RuntimeError("the archive is damaged")
        return Image.new("LAB" if index == 1 else "RGB", (8, 8))

    def describe(self, index: int) -> str:
        return f"archive.tar/{index}.jpg"


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> Iterator[CfgNode]:
    DatasetCatalog.register("failing", lambda: Failing(request.param))
    yield _cfg("DATASETS.TRAIN=failing", "SOLVER.IMS_PER_BATCH=2", "INPUT.FORMAT=L")
    DatasetCatalog.remove("failing")


# ---- training


def test_a_batch_is_what_its_parts_make_of_its_positions():
    """The definition, written out: position -> index -> image -> crops; masks from the plan."""
    cfg = _cfg("SEED=3")
    batch = _batches(cfg, 2)[1]
    assert batch.positions.tolist() == list(range(8, 16))
    dataset, sampler, augmentation = Synthetic(num_images=11, size=20), TrainingSampler(11, 3), MultiCrop(cfg)
    for i, position in enumerate(range(8, 16)):
        image = dataset.load(sampler.index_at(position))
        global_crops, local_crops = augmentation(image, position_rng(3, position, CROPS))
        assert torch.equal(batch.global_crops[i::8], torch.stack(global_crops))
        assert batch.local_crops is not None
        assert torch.equal(batch.local_crops[i::8], torch.stack(local_crops))
    plan = build_mask_plan(cfg)
    assert plan is not None
    assert batch.masks is not None
    assert batch.masks.shape == (16, 16)
    assert torch.equal(batch.masks, torch.from_numpy(plan.masks(list(range(8, 16)))))
    assert (batch.masks.sum(1) > 0).sum() == 8


def test_workers_change_nothing():
    here = _batches(_cfg(), 3)
    in_workers = _batches(_cfg("DATALOADER.NUM_WORKERS=2"), 3)
    for one, other in zip(here, in_workers, strict=True):
        _assert_same(one, other)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_together_have_the_batch_of_one_process(world_size: int):
    for iteration, whole in enumerate(_batches(_cfg(), 2)):
        ranks = [_batches(_cfg(), 1, start_iter=iteration, rank=r, world_size=world_size)[0] for r in range(world_size)]
        for part, expected in zip(ranks, whole.split(world_size), strict=True):
            _assert_same(part, expected)


def test_a_resumed_loader_goes_on_where_the_first_would():
    straight = _batches(_cfg(), 5)
    for one, other in zip(_batches(_cfg(), 2, start_iter=3), straight[3:], strict=True):
        _assert_same(one, other)


def test_rank_and_world_size_default_to_the_process_group(monkeypatch: pytest.MonkeyPatch):
    expected = _batches(_cfg(), 1, rank=1, world_size=2)[0]
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    _assert_same(_batches(_cfg(), 1)[0], expected)


def test_an_image_is_cropped_anew_in_every_epoch():
    """16 positions of a dataset of 2 images: 16 different first crops."""
    cfg = _cfg("DATASETS.TRAIN=synthetic:num_images=2:size=20")
    crops = torch.cat([batch.global_crops[:8] for batch in _batches(cfg, 2)])
    assert len(torch.unique(crops.flatten(1), dim=0)) == 16


def test_the_seed_matters():
    one, other = (_batches(_cfg(f"SEED={seed}"), 1)[0] for seed in (0, 1))
    assert not torch.equal(one.global_crops, other.global_crops)
    assert not torch.equal(one.masks, other.masks)  # type: ignore[arg-type]


def test_global_generators_do_not_matter():
    expected = _batches(_cfg(), 1)[0]
    torch.manual_seed(123)
    _assert_same(_batches(_cfg(), 1)[0], expected)


def test_no_masks_without_ibot():
    cfg = _cfg("MODEL.LOSS.IBOT_WEIGHT=0.0")
    assert build_mask_plan(cfg) is None
    assert _batches(cfg, 1)[0].masks is None


def test_the_mask_grid_is_rows_by_columns_of_the_global_crop():
    plan = build_mask_plan(_cfg("INPUT.GLOBAL_CROPS.SIZE_PX=(16, 24)", "INPUT.MASK.MIN_ASPECT=0.4"))
    assert plan is not None
    assert plan.masking.grid == (4, 6)
    assert plan.masking.min_aspect == 0.4
    assert plan.batch_size == 8


def test_several_datasets_are_one():
    cfg = _cfg()
    cfg.DATASETS.TRAIN = ("synthetic:num_images=3:size=20", "synthetic:num_images=5:size=24:seed=1")
    loader = build_train_loader(cfg)
    assert len(loader.dataset.dataset) == 8  # type: ignore[attr-defined]
    assert len(next(iter(loader))) == 8


def test_grey_images():
    cfg = _cfg("DATASETS.TRAIN=digits:split=test", "INPUT.FORMAT=L")
    batch = _batches(cfg, 1)[0]
    assert batch.global_crops.shape == (16, 1, 16, 16)
    assert batch.local_crops is not None
    assert batch.local_crops.shape == (16, 1, 8, 8)


def test_a_registered_augmentation_is_used():
    class Blank:
        def __init__(self, cfg: CfgNode) -> None:
            self.size = cfg.INPUT.GLOBAL_CROPS.SIZE_PX[0]

        def __call__(self, image: Any, rng: np.random.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            return [torch.full((1, self.size, self.size), v, dtype=torch.uint8) for v in (1, 2)], []

    AUGMENTATION_REGISTRY.register("Blank", Blank)
    try:
        batch = _batches(_cfg("INPUT.AUGMENTATION=Blank"), 1)[0]
    finally:
        del AUGMENTATION_REGISTRY._obj_map["Blank"]
    assert batch.global_crops[:, 0, 0, 0].tolist() == [1] * 8 + [2] * 8
    assert batch.local_crops is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create 7 worker")  # the number is honoured, not capped
def test_worker_options():
    plain = build_train_loader(_cfg())
    assert plain.num_workers == 0
    assert not plain.pin_memory
    workers = build_train_loader(_cfg("DATALOADER.NUM_WORKERS=7", "DATALOADER.PREFETCH_FACTOR=3", "MODEL.DEVICE=cuda"))
    assert (workers.num_workers, workers.prefetch_factor) == (7, 3)
    assert not workers.persistent_workers  # they would idle on after training, while features are evaluated
    assert workers.pin_memory


def test_what_workers_get_can_be_pickled():
    """Where processes are spawned, not forked, everything travels by pickle."""
    for loader in (build_train_loader(_cfg()), build_test_loader(_cfg(), "digits:split=test")):
        dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        batch, expected = collate([dataset[3], dataset[4]]), loader.collate_fn([loader.dataset[3], loader.dataset[4]])
        assert all(
            torch.equal(value, getattr(expected, name))
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        )


# ---- training: errors


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 8 is global and must be divisible by the 3 proc"):
        build_train_loader(_cfg(), rank=0, world_size=3)


def test_no_dataset_is_refused():
    cfg = _cfg()
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="No dataset is named"):
        build_train_loader(cfg)


def test_an_unknown_augmentation_names_the_closest():
    with pytest.raises(KeyError, match=r"'MultiCrops' in the AUGMENTATION registry \(did you mean 'MultiCrop'\?\)"):
        build_train_loader(_cfg("INPUT.AUGMENTATION=MultiCrops"))


@pytest.mark.parametrize("failing", ["mode"], indirect=True)
def test_an_image_that_cannot_be_augmented_is_named_with_its_position(failing: CfgNode):
    position = next(p for p in range(2) if TrainingSampler(2, 0).index_at(p) == 1)
    with pytest.raises(RuntimeError, match=rf"archive\.tar/1\.jpg \(position {position} of the stream\) failed: .*LAB"):
        _batches(failing, 1)


@pytest.mark.parametrize("failing", ["load"], indirect=True)
def test_an_image_that_cannot_be_loaded_is_named_with_its_position(failing: CfgNode):
    with pytest.raises(RuntimeError, match="the archive is damaged") as error:
        _batches(failing, 1)
    assert "archive.tar/1.jpg" in str(error.value)
    assert "position" in str(error.value)


@pytest.mark.parametrize("failing", ["mode"], indirect=True)
def test_an_evaluation_image_that_cannot_be_converted_is_named(failing: CfgNode):
    with pytest.raises((ValueError, RuntimeError), match="LAB") as error:
        list(build_test_loader(failing, "failing"))
    assert "archive.tar/1.jpg" in str(error.value)


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "1.jpg").write_bytes(b"no image")
    cfg = _cfg(f"DATASETS.TRAIN=folder:{tmp_path}")
    with pytest.raises(DataError, match=rf"{tmp_path}/1\.jpg is not a readable image"):
        _batches(cfg, 1)


def test_the_error_of_a_worker_is_our_message_alone(tmp_path: Path):
    (tmp_path / "1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        _batches(_cfg(f"DATASETS.TRAIN=folder:{tmp_path}", "DATALOADER.NUM_WORKERS=1"), 1)
    assert str(caught.value).startswith(f"Loading {tmp_path}/1.jpg (position ")
    assert "Traceback" not in str(caught.value)


def test_a_seed_that_nobody_drew_is_refused():
    with pytest.raises(ValueError, match="SEED"):
        _batches(_cfg("SEED=-1", "SOLVER.IMS_PER_BATCH=1"), 1)


# ---- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 7, 8])
def test_every_test_image_once_over_all_ranks(size: int, world_size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    cfg, name = _cfg(), f"synthetic:num_images={size}:num_classes=3:size=20"
    dataset, transform = Synthetic(num_images=size, num_classes=3, size=20), CenterCropTransform("RGB", 16, (16, 16))
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        for batch in build_test_loader(cfg, name):
            assert 1 <= len(batch) <= max(1, 4 // world_size)
            seen += batch.indices.tolist()
            assert batch.labels.tolist() == [i % 3 for i in batch.indices.tolist()]
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                assert torch.equal(image, transform(dataset.load(index)))
    assert seen == list(range(size))


def test_test_loader_with_workers_and_without_labels(tmp_path: Path):
    for i in range(5):
        Image.new("RGB", (20, 30), (i, i, i)).save(tmp_path / f"{i}.png")
    cfg = _cfg("DATALOADER.NUM_WORKERS=2", "INPUT.TEST.CROP_SIZE_PX=(8, 12)")
    batches = list(build_test_loader(cfg, f"folder:{tmp_path}"))
    assert [len(b) for b in batches] == [4, 1]
    assert all(b.labels is None for b in batches)
    images = torch.cat([b.images for b in batches])
    assert images.shape == (5, 3, 8, 12)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_several_test_strings_are_one_dataset():
    names = ("synthetic:num_images=2:size=20", "synthetic:num_images=3:size=24:seed=1")
    loader = build_test_loader(_cfg(), names)
    assert len(loader.dataset) == 5  # type: ignore[arg-type]
    assert torch.cat([b.indices for b in loader]).tolist() == [0, 1, 2, 3, 4]


def test_a_mixture_is_the_same_at_any_world_size_and_iteration() -> None:
    cfg = _cfg("DATASETS.TRAIN=('synthetic:num_images=20:size=12', 'synthetic:num_images=5:size=12:seed=1')")
    cfg.DATASETS.TRAIN_WEIGHTS = (1, 3)

    def images(world_size: int, start_iter: int, num_iters: int) -> list[int]:
        loaders = [build_train_loader(cfg, start_iter, rank=r, world_size=world_size) for r in range(world_size)]
        steps = islice(zip(*(loader.batch_sampler for loader in loaders), strict=True), num_iters)
        return [loaders[0].dataset.index_at(p) for step in steps for part in step for p in part]

    whole = images(1, 0, 20)
    assert images(2, 0, 20) == images(4, 0, 20) == whole
    assert images(2, 7, 13) == whole[7 * cfg.SOLVER.IMS_PER_BATCH :]
    second = [i for i in whole if i >= 20]
    assert len(second) > len(whole) / 2
    assert sorted(second[:5]) == sorted(second[5:10]) == list(range(20, 25))  # a pass, and another
    batch = next(iter(build_train_loader(cfg, 0)))
    assert batch.global_crops.shape[0] == 2 * cfg.SOLVER.IMS_PER_BATCH
    cfg.DATASETS.TRAIN_WEIGHTS = ()
    assert sorted(images(1, 0, 4)[:25]) == list(range(25))  # one set, each image once


def test_classes_come_equally_often(tmp_path: Path) -> None:
    cfg = _cfg(f"DATASETS.TRAIN=folder:{tmp_path}", "DATALOADER.SAMPLER=class_balanced")
    for name in ("a/0", "a/1", "a/2", "a/3", "a/4", "b/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    stream = build_train_loader(cfg).dataset
    indices = [stream.index_at(p) for p in range(20)]
    assert [sorted(pair)[1] for pair in zip(indices[::2], indices[1::2], strict=True)] == [5] * 10  # b/0 in every pair
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"class_balanced needs labels, and DATASETS\.TRAIN \['folder:.*'\] has none"):
        build_train_loader(cfg)


def test_images_come_as_often_as_a_file_says(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([0] * 9 + [1, 3]))
    cfg = _cfg("DATALOADER.SAMPLER=weighted", f"DATALOADER.SAMPLE_WEIGHTS={tmp_path}/w.npy")
    stream = build_train_loader(cfg).dataset
    counts = np.bincount([stream.index_at(p) for p in range(11 * 4)])
    assert (counts[:9].sum(), counts.sum()) == (0, 44)
    assert 8 <= counts[9] <= 12  # 2.75 of each 11, rounded down or up
    cfg.DATASETS.TRAIN = ("synthetic:num_images=12:size=20",)
    with pytest.raises(ValueError, match=r"each of the 12 images of DATASETS\.TRAIN.*holds int64 \[11\]"):
        build_train_loader(cfg)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_batch_says_which_entry_each_image_is_from(labelled: bool) -> None:
    cfg = _cfg(
        "DATASETS.TRAIN=('synthetic:num_images=5:num_classes=4:size=20', 'synthetic:num_images=3:num_classes=4:size=20:seed=1')"
    )
    if labelled:
        cfg.merge_from_list(["MODEL.CLASSIFIER.NUM_CLASSES", 4, "INPUT.AUGMENTATION", "SingleCrop"])
    loader = build_train_loader(cfg)
    batch = next(iter(loader))
    stream = loader.dataset.stream if labelled else loader.dataset
    indices = [stream.index_at(p) for p in range(8)]
    assert sorted(indices) == list(range(8))
    assert batch.sources.tolist() == [int(i >= 5) for i in indices]
    assert [part.sources.tolist() for part in batch.split(2)] == [
        batch.sources[:4].tolist(),
        batch.sources[4:].tolist(),
    ]
    cfg.DATASETS.TRAIN = ("synthetic:num_images=5:num_classes=4:size=20",)
    alone = next(iter(build_train_loader(cfg)))
    assert (alone.sources, alone.split(2)[1].sources) == (None, None)


_FAILED_TRAINER = """
from dinoengine.config import get_cfg
from dinoengine.data import build_train_loader

cfg = get_cfg()
cfg.merge_from_list(["SEED", 1, "DATASETS.TRAIN", ("digits",), "DATALOADER.NUM_WORKERS", 1, "SOLVER.IMS_PER_BATCH", 2])
batches = iter(build_train_loader(cfg))
next(batches)
raise SystemExit(3)
"""


@pytest.mark.slow
def test_a_training_that_fails_ends_though_its_workers_wait_for_more(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(_FAILED_TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, str(script)], env=environment, timeout=120).returncode == 3


_KILLED_TRAINER = """
import multiprocessing, os, signal, sys
from dinoengine.data.build import init_worker

def work(ready):
    init_worker(0)
    ready.send(os.getpid())
    signal.pause()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    context.Process(target=work, args=(writer,)).start()
    print(reader.recv(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_no_worker_of_a_killed_trainer_stays_behind(tmp_path: Path) -> None:
    """Where a server starts the workers, their parent outlives the trainer."""
    script = tmp_path / "trainer.py"
    script.write_text(_KILLED_TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    worker, deadline = int(done.stdout), time.monotonic() + 30
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
