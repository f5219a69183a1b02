"""Regions resized together: Pillow's pixels, whatever else is in the batch and however the device multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from dinoengine.data import batched_resize
from dinoengine.data.batched_resize import MAX_VALUES, is_height_first, num_values, resize_regions

Box = tuple[int, int, int, int]
SIZE = (96, 80)
# Of every kind: whole, larger and smaller than the result in each direction, of its size, at the edge, single rows.
BOXES: list[Box] = [
    *[(0, 0, 300, 400), (5, 7, 120, 60), (5, 7, 60, 120), (5, 7, 33, 21)],
    *[(100, 0, *SIZE), (299, 399, 1, 1), (3, 3, 1, 50), (3, 3, 50, 1)],
]


def _photograph() -> np.ndarray:
    return np.ascontiguousarray(load_sample_image("china.jpg")[100:400, 150:550])


def _resized(image: np.ndarray, boxes: list[Box], size: tuple[int, int] = SIZE) -> Tensor:
    columns = image.shape[1]
    regions = [[top * columns + left, columns, 1, height, width] for top, left, height, width in boxes]
    largest = max(box[2] for box in boxes), max(box[3] for box in boxes)
    return resize_regions(torch.from_numpy(image).flatten(0, 1), torch.tensor(regions), largest, size)


def _by_pillow(image: np.ndarray, box: Box, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The width first, whichever it would do first."""
    top, left, height, width = box
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    narrow = part.resize((size[1], height), Image.Resampling.BICUBIC)
    return np.asarray(narrow.resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_regions_are_resized_as_pillow_does() -> None:
    """A level at most but in two passes that round; fewer than one pixel in a hundred."""
    image = _photograph()
    for crop, box in zip(_resized(image, BOXES), BOXES, strict=True):
        difference = np.abs(crop.numpy().astype(int) - _by_pillow(image, box))
        assert difference.mean() < 0.01, box
        assert difference.max() <= 2, box


def test_noise_at_the_ends_of_the_range_is_cut_as_pillow_does() -> None:
    image = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (120, 90, 3))
    for box in ((0, 0, 120, 90), (3, 4, 40, 30)):
        difference = np.abs(_resized(image, [box])[0].numpy().astype(int) - _by_pillow(image, box))
        assert difference.mean() < 0.02
        assert difference.max() <= 2


def test_a_region_of_the_size_of_the_crop_stays_as_it_is() -> None:
    image = _photograph()
    assert np.array_equal(_resized(image, [(10, 20, *SIZE)])[0].numpy(), image[10:106, 20:100].transpose(2, 0, 1))


def test_rows_for_columns_are_the_height_first() -> None:
    image, (top, left, height, width) = _photograph(), (5, 7, 120, 60)
    region = torch.tensor([[top * 400 + left, 1, 400, width, height]])
    found = resize_regions(torch.from_numpy(image).flatten(0, 1), region, (width, height), SIZE[::-1])[0]
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    difference = np.abs(found.numpy().astype(int) - _by_pillow(turned, (left, top, width, height), SIZE[::-1]))
    assert difference.mean() < 0.01


@pytest.mark.parametrize(
    "region", [(60, 120), (120, 60), (120, 91), (120, 92), (96, 10), (300, 400), (400, 200), (97, 80)], ids=str
)
def test_which_direction_pillow_takes_first(region: tuple[int, int]) -> None:
    """Black and white noise, of which the first pass cuts off what overshoots."""
    pixels = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), region)
    image = Image.fromarray(pixels)
    found = image.resize(SIZE[::-1], Image.Resampling.BICUBIC)
    first = (region[1], SIZE[0]) if is_height_first(region, SIZE) else (SIZE[1], region[0])
    expected = image.resize(first, Image.Resampling.BICUBIC).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_neither_the_batch_nor_the_precision_of_products_counts(precision: Callable[[str], None]) -> None:
    image = _photograph()
    alone = [_resized(image, [box])[0] for box in BOXES]
    for name in ("highest", "high", "medium"):
        precision(name)
        assert torch.equal(_resized(image, BOXES), torch.stack(alone))


@pytest.mark.parametrize("length", [1, 2, 7, 50, 80, 300, 4000])
def test_products_are_exact_in_bfloat16_factors_and_float32_sums(length: int) -> None:
    """Two parts, each of which bfloat16 holds; whole numbers of 2**-15; 255 times their sum is below 2**24 of those."""
    weights = batched_resize._weights(torch.tensor([[[length]]]), length, 80)[0]
    assert torch.equal(weights.bfloat16().float(), weights)
    units = weights.double() * 2**15
    assert torch.equal(units.round(), units)
    assert units.abs().sum(0).view(2, -1).sum(0).max() * 255 < 2**24
    assert (units.sum(0).view(2, -1).sum(0) / 2**15 - 1).abs().max() < 1e-3


def test_a_large_region_is_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    image, boxes = _photograph(), [(0, 0, 300, 400), (0, 0, 200, 390)]
    whole = _resized(image, boxes)
    monkeypatch.setattr(batched_resize, "MAX_VALUES", 20_000)
    assert torch.equal(_resized(image, boxes), whole)


def test_values_of_a_batch() -> None:
    assert num_values((300, 400), (96, 80), 3) == 3 * 300 * 400  # the region itself
    assert num_values((300, 100), (96, 80), 3) == 3 * 300 * 2 * 80  # after the first pass
    assert num_values((8, 8), (224, 224), 1) == 2 * 224 * 224  # after the second
    assert num_values((500, 500), (224, 224), 3) * 20 < MAX_VALUES
