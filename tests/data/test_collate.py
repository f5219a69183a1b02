from __future__ import annotations

import pickle

import pytest
import torch

from dinoengine.data import BlockMasking, MaskPlan
from dinoengine.data.collate import CropSample, LabelledImage, SSLCollate, collate_images


def _sample(position: int, num_global: int = 2, num_local: int = 3) -> CropSample:
    """Every crop has one value: 10 * position + view; local crops add 100 and are smaller."""

    def crop(value: int, rows: int, columns: int) -> torch.Tensor:
        return torch.full((3, rows, columns), value, dtype=torch.uint8)

    return CropSample(
        position,
        position + 20,
        [crop(10 * position + v, 6, 8) for v in range(num_global)],
        [crop(100 + 10 * position + v, 2, 4) for v in range(num_local)],
    )


def _plan(batch_size: int = 4, **options: float) -> MaskPlan:
    return MaskPlan(BlockMasking((3, 4)), batch_size=batch_size, seed=0, **options)  # type: ignore[arg-type]


def test_crops_are_view_major():
    batch = SSLCollate(None)([_sample(p) for p in (4, 5, 7)])
    assert len(batch) == 3
    assert batch.global_crops.shape == (6, 3, 6, 8)
    assert batch.global_crops[:, 0, 0, 0].tolist() == [40, 50, 70, 41, 51, 71]
    assert batch.local_crops is not None
    assert batch.local_crops.shape == (9, 3, 2, 4)
    assert batch.local_crops[:, 0, 0, 0].tolist() == [140, 150, 170, 141, 151, 171, 142, 152, 172]
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    assert batch.positions.tolist() == [4, 5, 7]
    assert batch.positions.dtype == torch.int64
    assert (batch.num_global_views, batch.num_local_views) == (2, 3)
    first, second = batch.global_crops.chunk(2)
    assert torch.equal(second, first + 1)


def test_without_local_crops_or_masks_they_are_none():
    batch = SSLCollate(None)([_sample(p, num_local=0) for p in (0, 1)])
    assert batch.local_crops is None
    assert batch.masks is None
    assert batch.num_local_views == 0


def test_masks_are_those_of_the_plan_for_these_positions():
    batch = SSLCollate(_plan(crop_share=1.0))([_sample(p) for p in (5, 6)])
    assert batch.masks is not None
    assert batch.masks.shape == (4, 12)
    assert batch.masks.dtype == torch.bool
    # Rows like those of the crops: both images of view 1, then of view 2. Batch 1 holds positions 4 to 7.
    assert batch.masks.sum(1).tolist() == _plan(crop_share=1.0).counts(1)[:, 1:3].ravel().tolist()


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_micro_batch_is_the_batch_of_its_positions(num_parts: int):
    collate = SSLCollate(_plan(crop_share=1.0))
    parts = collate([_sample(p) for p in range(4)]).split(num_parts)
    size = 4 // num_parts
    for i, part in enumerate(parts):
        expected = collate([_sample(p) for p in range(i * size, (i + 1) * size)])
        for name in ("global_crops", "local_crops", "masks", "positions"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name


def test_a_pickled_collate_does_the_same():
    collate = SSLCollate(_plan())
    samples = [_sample(p) for p in range(4)]
    masks, again = collate(samples).masks, pickle.loads(pickle.dumps(collate))(samples).masks
    assert masks is not None
    assert torch.equal(masks, again)


def test_masks_and_crops_of_different_numbers_of_views_are_refused():
    with pytest.raises(ValueError, match="view"):
        SSLCollate(_plan())([_sample(p, num_global=3) for p in range(4)])


def _image(index: int, label: int | None) -> LabelledImage:
    return LabelledImage(torch.full((1, 2, 3), index, dtype=torch.uint8), label, index)


def test_images_with_labels():
    batch = collate_images([_image(7, 2), _image(8, 0)])
    assert batch.images.shape == (2, 1, 2, 3)
    assert batch.images[:, 0, 0, 0].tolist() == [7, 8]
    assert batch.labels is not None
    assert batch.labels.tolist() == [2, 0]
    assert batch.labels.dtype == torch.int64
    assert batch.indices.tolist() == [7, 8]
    assert batch.indices.dtype == torch.int64


def test_images_without_labels():
    assert collate_images([_image(7, None), _image(8, None)]).labels is None
