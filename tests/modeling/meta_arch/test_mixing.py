from __future__ import annotations

import math

import pytest
import torch

from dinoengine.modeling.meta_arch.mixing import BatchMixing
from dinoengine.structures import ImageBatch
from dinoengine.utils.env import seed_step_rng

SIZE, CLASSES = 6, 3


def _batch() -> ImageBatch:
    """Image i is 40 * i everywhere; its label is i % 3."""
    values = 40 * torch.arange(SIZE, dtype=torch.uint8)
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ImageBatch(images, torch.arange(SIZE) % CLASSES, torch.arange(SIZE))


def _drawn(mixup: float, cutmix: float, iteration: int, rank: int = 0) -> ImageBatch:
    seed_step_rng(0, iteration, rank)
    return BatchMixing(CLASSES, mixup, cutmix)(_batch())


def _one_hot(label: int) -> torch.Tensor:
    return torch.eye(CLASSES)[label]


def test_mixup_takes_the_same_share_of_both_images_and_both_labels() -> None:
    mixed = _drawn(0.8, 0.0, iteration=3)
    assert mixed.labels is not None
    share = mixed.labels[0, 0].item()  # of image 0, whose label is 0; the other image is number 5 with label 2
    assert 0 < share < 1
    for i in range(SIZE):
        other = (i - 1) % SIZE
        pixel = (share * 40 * i + (1 - share) * 40 * other) / 255
        torch.testing.assert_close(mixed.images[i], torch.full((3, 8, 8), pixel))
        expected = share * _one_hot(i % CLASSES) + (1 - share) * _one_hot(other % CLASSES)
        torch.testing.assert_close(mixed.labels[i], expected)
    assert mixed.indices.tolist() == list(range(SIZE))


def test_cutmix_gives_each_label_the_share_of_its_pixels() -> None:
    shares = set()
    for iteration in range(20):
        mixed = _drawn(0.0, 1.0, iteration)
        assert mixed.labels is not None
        for i in range(SIZE):
            own = (mixed.images[i, 0] * 255).round() == 40 * i
            assert ((mixed.images[i, 0] * 255).round()[~own] == 40 * ((i - 1) % SIZE)).all()
            share = own.float().mean().item()
            assert mixed.labels[i, i % CLASSES].item() == pytest.approx(share, abs=1e-6)
            assert mixed.labels[i].sum().item() == pytest.approx(1)
        shares.add(share)
    assert len(shares) > 5


def test_draws_depend_on_seed_iteration_and_rank_alone() -> None:
    first = _drawn(0.8, 1.0, iteration=7)
    torch.rand(100)
    assert torch.equal(first.images, _drawn(0.8, 1.0, iteration=7).images)
    assert not torch.equal(first.images, _drawn(0.8, 1.0, iteration=8).images)
    assert not torch.equal(first.images, _drawn(0.8, 1.0, iteration=7, rank=1).images)


def test_with_both_each_batch_gets_one_of_them() -> None:
    kinds = []
    for iteration in range(60):
        pixels = (_drawn(0.8, 1.0, iteration).images[1, 0] * 255).round()
        kinds.append("cutmix" if set(pixels.unique().tolist()) <= {0.0, 40.0} else "mixup")
    assert abs(kinds.count("mixup") - 30) < 4 * math.sqrt(60 / 4)
    assert kinds.count("cutmix") > 10


def test_images_that_are_float_already_keep_their_scale() -> None:
    batch = _batch()
    seed_step_rng(0, 0, 0)
    batch.images = batch.images.float() / 255
    mixed = BatchMixing(CLASSES, 0.8, 0.0)(batch)
    torch.testing.assert_close(mixed.images, _drawn(0.8, 0.0, iteration=0).images)
