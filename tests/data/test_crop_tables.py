"""What workers write down for the device: regions of the part that is sent, groups that are bounded, operations in order."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.data import crop_tables
from dinoengine.data.crop_recipe import CropRecipe
from dinoengine.data.crop_tables import PendingCrop, Resize, Step, pending_crops, tabulate_crops

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
SIZE = (8, 8)


@pytest.fixture(autouse=True)
def _width_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow is installed."""
    monkeypatch.setattr(crop_tables, "is_height_first", lambda region, size: False)


def _pending(boxes: list[tuple[int, int, int, int]], image: Image.Image = IMAGE) -> list[PendingCrop]:
    return pending_crops(image, [CropRecipe(box, SIZE) for box in boxes])


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1), ("RGBA", 4)])
def test_crops_share_the_part_of_the_image_that_they_need(mode: str, channels: int) -> None:
    crops = _pending([(4, 5, 6, 7), (3, 9, 2, 11)], IMAGE.convert(mode))
    whole = np.asarray(IMAGE.convert(mode)).reshape(20, 30, channels)
    assert crops[0].image is crops[1].image
    assert np.array_equal(crops[0].image.numpy(), whole[3:10, 5:20])
    assert [crop.recipe.box for crop in crops] == [(1, 0, 6, 7), (0, 4, 2, 11)]
    assert crops[0].image.is_contiguous()


def test_regions_are_where_the_pixels_of_the_boxes_are() -> None:
    """Two images one after the other; a group of crops of both, another group of one."""
    one, other = _pending([(0, 0, 20, 30), (3, 4, 5, 6)]), _pending([(2, 2, 9, 8), (4, 4, 1, 2)])
    tables, plans = tabulate_crops([[one[0], other[0]], [one[1], other[1]]])
    assert tables.pixels.shape == (20 * 30 + 9 * 8, 3)
    assert [(plan.size, plan.num_crops, plan.num_channels) for plan in plans] == [(SIZE, 2, 3)] * 2
    crops = [(one[0], other[0]), (one[1], other[1])]
    for plan, group in zip(plans, crops, strict=True):
        (resize,) = plan.resizes
        for first, row_step, column_step, rows, columns, place in tables.regions[resize.first : resize.last].tolist():
            top, left, height, width = group[place].recipe.box
            inside = torch.arange(rows)[:, None] * row_step + torch.arange(columns) * column_step + first
            assert torch.equal(tables.pixels[inside], group[place].image[top : top + height, left : left + width])
    assert plans[0].resizes == (Resize(0, 2, (20, 30), False),)
    assert plans[1].resizes == (Resize(2, 4, (5, 6), False),)


def test_regions_that_are_resized_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [(0, 0, 20, 30), (0, 0, 2, 3), (0, 0, 20, 29), (0, 0, 3, 3), (0, 0, 10, 16)]
    monkeypatch.setattr(crop_tables, "MAX_VALUES", 2 * 3 * 20 * 30)  # two of the largest
    tables, (plan,) = tabulate_crops([_pending(boxes)])
    assert plan.resizes == (Resize(0, 3, (10, 16), False), Resize(3, 5, (20, 30), False))
    assert tables.regions[:, 5].tolist() == [1, 3, 4, 2, 0]  # by size, so that little is filled up
    monkeypatch.setattr(crop_tables, "MAX_VALUES", 1)
    _, (plan,) = tabulate_crops([_pending(boxes)])
    assert [resize.last - resize.first for resize in plan.resizes] == [1] * 5


def test_crops_of_which_the_height_is_first_are_a_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_tables, "is_height_first", lambda region, size: region[0] > region[1])
    boxes = [(1, 2, 9, 5), (0, 0, 5, 9), (3, 3, 4, 3)]
    tables, (plan,) = tabulate_crops([_pending([(0, 0, 20, 30), *boxes])])
    assert plan.resizes == (Resize(0, 2, (20, 30), False), Resize(2, 4, (5, 9), True))
    assert tables.regions[2:].tolist() == [[3 * 30 + 3, 1, 30, 3, 4, 3], [1 * 30 + 2, 1, 30, 5, 9, 1]]


def test_operations_come_in_the_order_drawn() -> None:
    recipes = [
        CropRecipe((0, 0, 5, 5), SIZE, jitter=(("hue", -0.1), ("brightness", 0.7)), solarize=128),
        CropRecipe((0, 0, 5, 5), SIZE, flip=True, jitter=(("brightness", 0.9),), blur=(3, 1.0), grey=True),
        CropRecipe((0, 0, 5, 5), SIZE, jitter=(("hue", 0.5), ("saturation", 1.1)), blur=(5, 2.0)),
    ]
    tables, (plan,) = tabulate_crops([pending_crops(IMAGE, recipes)])
    told: list[Any] = []
    for step in plan.steps:
        rows = tables.rows[step.first : step.last].tolist()
        values = tables.values[step.first_value : step.first_value + len(rows) * step.width]
        told.append((step.operation, rows, values.view(len(rows), step.width)))
    assert [(name, rows) for name, rows, _ in told] == [
        ("flip", [1]), ("brightness", [1]), ("hue", [0, 2]),  # first in the order of jitter
        ("brightness", [0]), ("saturation", [2]),  # second
        ("grey", [1]), ("blur", [1]), ("blur", [2]), ("solarize", [0]),
    ]  # fmt: skip
    assert told[2][2].tolist() == [[231.0], [127.0]]  # int(-25.5) and int(127.5) of 256 steps
    assert told[0][2].shape == (1, 0)
    narrow, wide = told[6][2][0], told[7][2][0]
    assert narrow.tolist() == pytest.approx([0.27407, 0.45186, 0.27407], abs=1e-5)
    assert (len(wide), wide.sum().item()) == (5, pytest.approx(1))
    assert plan.steps[0] == Step("flip", 0, 1, 0, 0)
    assert tables.values.dtype == torch.float32


def test_crops_without_operations_have_no_steps() -> None:
    _, (plan,) = tabulate_crops([_pending([(0, 0, 5, 5)])])
    assert plan.steps == ()


def test_plans_can_be_sent_by_a_worker() -> None:
    tables, plans = tabulate_crops([_pending([(0, 0, 5, 5), (1, 1, 4, 4)])])
    assert pickle.loads(pickle.dumps(plans)) == plans
    assert torch.equal(pickle.loads(pickle.dumps(tables)).regions, tables.regions)


def test_crops_of_a_group_have_one_size() -> None:
    other = pending_crops(IMAGE, [CropRecipe((0, 0, 5, 5), (9, 9))])
    with pytest.raises(AssertionError, match="crops of several sizes"):
        tabulate_crops([[*_pending([(0, 0, 5, 5)]), *other]])
