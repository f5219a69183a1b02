"""What takes the place of an image that cannot be used, and that nothing but (seed, position, attempt) decides it."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.config import CfgNode
from dinoengine.data import (
    DataError,
    ImageDataset,
    ImageFolder,
    LabelledStream,
    SingleCrop,
    TrainingSampler,
    TrainingStream,
    build_test_loader,
    build_train_loader,
)
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.data.streams import NUM_REPLACEMENTS
from dinoengine.structures import BadImage, ImageBatch, SSLBatch


class Faulty(ImageDataset):
    """Image i is one pixel of value i; some cannot be loaded."""

    def __init__(self, size: int, bad: Collection[int], error: Exception | None = None) -> None:
        self.class_names = [str(i) for i in range(8)]
        self.size, self.bad, self.error, self.asked = size, bad, error or ValueError("broken"), [0] * size

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> Image.Image:
        self.asked[index] += 1
        if index in self.bad:
            raise self.error
        return Image.new("L", (1, 1), index)

    def label(self, index: int) -> int | None:
        return index % 8


def _crop(image: Image.Image, rng: np.random.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Says which image it got, and the first number of the generator."""
    return [torch.tensor([image.getpixel((0, 0)), int(rng.integers(2**31))])], []


def _stream(dataset: ImageDataset, seed: int = 0, num_replacements: int = NUM_REPLACEMENTS) -> TrainingStream:
    return TrainingStream(dataset, TrainingSampler(len(dataset), seed), _crop, seed, num_replacements)


def _index(stream: TrainingStream, position: int) -> int:
    return int(stream[position].global_crops[0][0])


def test_a_bad_image_is_replaced_and_all_others_stay():
    bad = {3, 7, 11}
    stream, sampler = _stream(Faulty(40, bad)), TrainingSampler(40, 0)
    for position in range(120):
        sample, own = stream[position], sampler.index_at(position)
        got, draw = sample.global_crops[0].tolist()
        assert (sample.position, sample.image_index) == (position, got)
        assert draw == position_rng(0, position, CROPS).integers(2**31), "the crops belong to the position asked for"
        if own in bad:
            assert got not in bad
            assert sample.bad_images[0] == BadImage(position, f"Faulty[{own}]", "ValueError: broken")
        else:
            assert got == own
            assert sample.bad_images == ()


def test_the_replacement_depends_on_seed_position_and_attempt_alone():
    """Whatever was asked before, in whatever order, by another process."""
    bad = set(range(0, 40, 2))
    expected = [_index(_stream(Faulty(40, bad)), p) for p in range(80)]
    stream = pickle.loads(pickle.dumps(_stream(Faulty(40, bad))))
    order = np.random.default_rng(0).permutation(80).tolist()
    assert {p: _index(stream, p) for p in order} == dict(enumerate(expected))
    assert [_index(_stream(Faulty(40, bad), seed=1), p) for p in range(80)] != expected
    first, second = ([stream.index_at(p, attempt) for p in range(80)] for attempt in (1, 2))
    assert first != second


def test_a_replacement_is_tried_again_only_if_it_is_bad_too():
    """The same positions with one more bad image: only those that used it change, to their next attempt."""
    before, after = _stream(Faulty(40, {3})), _stream(Faulty(40, {3, 20}))
    for position in range(200):
        if _index(before, position) != 20:
            assert _index(after, position) == _index(before, position)
        else:
            tries = [after.index_at(position, k) for k in range(NUM_REPLACEMENTS + 1)]
            assert _index(after, position) == next(i for i in tries if i not in (3, 20))


def test_replacements_are_spread_over_the_set():
    """One image in place of many would be seen too often: 400 bad positions, 39 good images."""
    stream = _stream(Faulty(40, {3}))
    used = [stream.index_at(p, 1) for p in range(400)]
    counts = np.bincount(used, minlength=40)
    assert counts.min() >= 1
    assert counts.max() <= 25  # 10 expected, binomial deviation 3.1


def test_every_image_that_was_passed_over_is_named_once():
    dataset = Faulty(3, {0, 1})
    stream = _stream(dataset)
    named = [(bad.position, bad.path) for p in range(30) for bad in stream[p].bad_images]
    assert len(named) == len(set(named))
    assert {path for _, path in named} == {"Faulty[0]", "Faulty[1]"}
    assert {_index(stream, p) for p in range(30)} == {2}


def test_a_set_without_a_good_image_ends_quickly_and_says_so():
    dataset = Faulty(4, {0, 1, 2, 3})
    with pytest.raises(
        DataError, match=r"no image that can be used.* met 4 bad image.*\n  Faulty\[\d\]: ValueError: br"
    ):
        _stream(dataset)[0]
    assert max(dataset.asked) == 1, "no image is decoded twice for one position"


def test_without_replacements_the_image_is_an_error():
    stream = _stream(Faulty(1, {0}), num_replacements=0)
    with pytest.raises(DataError, match=r"Loading Faulty\[0\] \(position 5 of the stream\) failed: broken"):
        stream[5]


@pytest.mark.parametrize("fault", [MemoryError("no memory"), OSError(errno.EMFILE, "Too many open files")], ids=repr)
def test_a_fault_of_the_machine_replaces_nothing(fault: Exception):
    with pytest.raises(DataError, match="Loading Faulty"):
        _stream(Faulty(1, {0}, fault))[0]


def test_a_broken_augmentation_replaces_nothing():
    def fail(image: Any, rng: Any) -> Any:
        raise ZeroDivisionError("a bug")

    dataset = Faulty(8, ())
    with pytest.raises(DataError, match=r"Augmenting Faulty\[\d\] \(position 0 of the stream\) failed: a bug"):
        TrainingStream(dataset, TrainingSampler(8, 0), fail, 0, NUM_REPLACEMENTS)[0]
    assert sum(dataset.asked) == 1


def test_the_label_is_that_of_the_replacement():
    stream = LabelledStream(_stream(Faulty(40, {3, 7})))
    replaced = 0
    for position in range(80):
        image = stream[position]
        assert image.index == image.image[0]
        assert image.label == image.index % 8
        replaced += len(image.bad_images)
    assert replaced >= 4


# ---- through the loader


def _folder(root: Path, num_images: int = 12, bad: Collection[str] = ("01", "05")) -> str:
    for i in range(num_images):
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{i:02d}.png"
        Image.fromarray(np.full((12, 12, 3), 20 * i, dtype=np.uint8)).save(path)
        if path.stem in bad:
            path.write_bytes(path.read_bytes()[:40])
    return f"folder:{root}"


def _same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else value == getattr(other, name)
        for name, value in vars(one).items()
    )


def _batches(cfg: CfgNode, count: int, **options: Any) -> list[Any]:
    return list(islice(build_train_loader(cfg, replace_bad_images=True, **options), count))


def test_neither_workers_nor_processes_nor_a_resume_change_it(tiny_cfg: CfgNode, tmp_path: Path):
    tiny_cfg.DATASETS.TRAIN = (_folder(tmp_path),)
    whole = _batches(tiny_cfg, 6)
    assert isinstance(whole[0], SSLBatch)
    named = [bad for batch in whole for bad in batch.bad_images]
    assert {Path(bad.path).stem for bad in named} == {"01", "05"}
    assert [bad.position for bad in named] == sorted(bad.position for bad in named)
    assert all(_same(*pair) for pair in zip(whole[4:], _batches(tiny_cfg, 2, start_iter=4), strict=True))
    tiny_cfg.DATALOADER.NUM_WORKERS = 2
    assert all(_same(*pair) for pair in zip(whole, _batches(tiny_cfg, 6), strict=True))
    tiny_cfg.DATALOADER.NUM_WORKERS = 0
    for iteration, batch in enumerate(whole):
        parts = [_batches(tiny_cfg, 1, start_iter=iteration, rank=r, world_size=2)[0] for r in range(2)]
        assert torch.equal(torch.cat([p.positions for p in parts]), batch.positions)
        for part, expected in zip(parts, batch.split(2), strict=True):
            assert torch.equal(part.global_crops, expected.global_crops)
        assert parts[0].bad_images + parts[1].bad_images == batch.bad_images


def test_a_classifier_learns_the_label_of_what_it_sees(classifier_cfg: CfgNode, tmp_path: Path):
    classifier_cfg.DATASETS.TRAIN = (_folder(tmp_path),)
    dataset = ImageFolder(str(tmp_path))
    for batch in _batches(classifier_cfg, 6):
        assert isinstance(batch, ImageBatch)
        for image, label, index in zip(batch.images, batch.labels, batch.indices.tolist(), strict=True):
            value = 20 * int(Path(dataset.path(index)).stem)
            assert image.unique().tolist() == [value]
            assert label == dataset.label(index) == value // 20 % 3
    assert SingleCrop.__name__ == classifier_cfg.INPUT.AUGMENTATION


def test_a_loader_replaces_nothing_unless_it_is_asked_to(tiny_cfg: CfgNode, tmp_path: Path):
    """Probes and plain loops, which look at no ``bad_images``, must not train on other images in silence."""
    tiny_cfg.DATASETS.TRAIN = (_folder(tmp_path),)
    with pytest.raises(
        DataError, match=r"Loading .*/0[15]\.png \(position \d+ of the stream\) failed: .* not a readable"
    ):
        list(islice(build_train_loader(tiny_cfg), 3))


def test_an_evaluation_names_the_image_and_replaces_nothing(tiny_cfg: CfgNode, tmp_path: Path):
    with pytest.raises(DataError, match=r"/01\.png is not a readable image"):
        list(build_test_loader(tiny_cfg, _folder(tmp_path, bad=("01",))))


def test_the_pixel_limit_of_the_config_reaches_every_dataset(tiny_cfg: CfgNode, tmp_path: Path):
    string = _folder(tmp_path, bad=())
    Image.new("L", (13, 12)).save(tmp_path / "class0" / "large.png")
    tiny_cfg.DATALOADER.MAX_IMAGE_PIXELS = 12 * 12
    tiny_cfg.DATASETS.TRAIN = (string, "synthetic:num_images=2:size=12")
    bad = {(Path(b.path).name, b.cause[:25]) for batch in _batches(tiny_cfg, 8) for b in batch.bad_images}
    assert bad == {("large.png", "13 x 12 pixels, and DATAL")}
    with pytest.raises(
        DataError, match=r"large\.png is not a readable image \(13 x 12 pixels, and DATALOADER.MAX_IMAGE_PIX"
    ):
        list(build_test_loader(tiny_cfg, string))
