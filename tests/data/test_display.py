from __future__ import annotations

import numpy as np
import pytest
import torch

from dinoengine.data.channels import Channels
from dinoengine.data.display import Display, class_colours, with_masked_patches
from dinoengine.structures import IGNORE


def test_colours_and_grey_are_shown_as_they_are() -> None:
    image = torch.rand(3, 4, 5)
    assert np.array_equal(Display("RGB", []).pixels(image), (image * 255).round().byte().permute(1, 2, 0).numpy())
    grey = Display("L", []).pixels(torch.tensor([[[0.2, 1.4]]]))
    assert grey.tolist() == [[[51] * 3, [255] * 3]]
    assert Display("RGB", []).describe() == ""


def test_what_is_transparent_shows_a_checkerboard() -> None:
    image = torch.ones(4, 16, 16)
    image[3, :, 8:] = 0
    shown = Display("RGBA", []).pixels(image)
    assert (shown[:, :8] == 255).all()
    assert sorted(np.unique(shown[:, 8:]).tolist()) == [153, 204]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_channels_are_stretched_alike_on_all_images(count: int) -> None:
    images = [torch.rand(count, 20, 20) * 0.1 + 0.2, torch.rand(count, 20, 20) * 0.1 + 0.5]
    display = Display(Channels(count, (0, 1)), images)
    for low, high in display.limits:
        assert low == pytest.approx(0.2, abs=0.01)
        assert high == pytest.approx(0.6, abs=0.01)
    assert display.channel(images[0], 0).max() < display.channel(images[1], 0).min()
    assert display.pixels(torch.zeros(count, 2, 2)).max() == 0
    assert display.pixels(torch.ones(count, 2, 2)).max() == 255


def test_each_channel_has_the_colour_that_the_note_names() -> None:
    display = Display(Channels(4, (0, 1)), [torch.stack([torch.linspace(0, 1, 100).view(10, 10)] * 4)])
    note = display.describe()
    for channel, (name, colour) in enumerate(
        [("red", [255, 0, 0]), ("green", [0, 255, 0]), ("blue", [0, 0, 255]), ("yellow", [255, 255, 0])]
    ):
        image = torch.zeros(4, 1, 1)
        image[channel] = 1
        assert display.pixels(image).tolist() == [[colour]]
        assert f"{channel} {name} (" in note


def test_a_channel_with_one_value_is_not_divided_by_zero() -> None:
    display = Display(Channels(1, (0, 1)), [torch.full((1, 4, 4), 0.5)])
    assert display.pixels(torch.full((1, 1, 1), 0.5)).tolist() == [[[128] * 3]]
    assert "0 grey" in display.describe()


def test_masked_patches_are_covered_and_no_others() -> None:
    pixels = np.full((4, 6, 3), 200, dtype=np.uint8)
    shown = with_masked_patches(pixels, np.array([[True, False, False], [False, False, True]]))
    covered = (shown != 200).any(axis=-1)
    assert covered[:2, :2].all()
    assert covered[2:, 4:].all()
    assert covered.sum() == 8


def test_classes_have_colours_of_their_own() -> None:
    colours = class_colours(np.arange(256, dtype=np.uint8)[None])[0]
    assert colours[IGNORE].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in colours[:40].tolist()}) == 40
