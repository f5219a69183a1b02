"""Crops of any number of channels against the published operations on 8 bits, and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from dinoengine.config import get_cfg
from dinoengine.data import MultiCrop
from dinoengine.data.channel_crops import BLURS, render_channels
from dinoengine.data.channels import Channels, in_format
from dinoengine.data.crop_backends import BACKENDS, render_crops
from dinoengine.data.crop_recipe import CropRecipe, render_reference
from dinoengine.data.random_streams import CROPS, position_rng

BOX, SIZE = (20, 30, 200, 260), (64, 64)
# By "reference" on 8 bits each of these rounds, and the float does not.
OPERATIONS = {
    "resize": {},
    "flip": {"flip": True},
    "brightness": {"jitter": (("brightness", 1.4),)},
    "contrast up": {"jitter": (("contrast", 1.4),)},
    "contrast down": {"jitter": (("contrast", 0.6),)},
    "blur": {"blur": (9, 1.3)},
    "solarize": {"solarize": 128},
}


def _grey() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).convert("L")


def _deep(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.uint16) * 257


@pytest.fixture(params=BLURS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "fast":
        pytest.importorskip("cv2")
    return str(request.param)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_the_published_one_without_rounding(name: str, backend: str) -> None:
    recipe = CropRecipe(BOX, SIZE, **OPERATIONS[name])  # type: ignore[arg-type]
    expected = render_reference(_grey(), recipe).float() / 255
    found = render_channels(in_format(_deep(_grey()), Channels(1, (0, 65535))), recipe, BLURS[backend])
    difference = (found - expected).abs()
    if name == "solarize":  # a value at the threshold may be on the other side of it
        assert (difference > 1.1 / 255).float().mean() < 0.01
    else:
        assert difference.max() < 2.1 / 255
        assert difference.mean() < 0.6 / 255


def test_channels_do_not_touch_each_other(backend: str) -> None:
    """Also contrast goes by the mean of each: a bright channel does not wash out a dark one."""
    rng = np.random.default_rng(0)
    stack = np.stack([rng.integers(0, high, (300, 300)) for high in (65536, 300, 40000, 9000, 65536)], axis=-1)
    recipe = CropRecipe(BOX, SIZE, True, (("contrast", 0.7), ("brightness", 1.2)), False, (9, 1.0), 128)
    together = render_channels(in_format(stack, Channels(5, (0, 65535))), recipe, BLURS[backend])
    for channel in range(5):
        alone = render_channels(in_format(stack[..., channel], Channels(1, (0, 65535))), recipe, BLURS[backend])
        torch.testing.assert_close(together[channel], alone[0], atol=1e-6, rtol=0)


def test_a_region_that_keeps_its_size_keeps_16_bits(backend: str) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = in_format(levels, Channels(1, (0, 65535)))
    crop = render_channels(image, CropRecipe((0, 0, 256, 256), (256, 256)), BLURS[backend])
    assert np.array_equal((crop * 65535).round().numpy()[0], levels)
    crop.zero_()
    assert image.max() == 1, "the crop has memory of its own"


def test_the_backends_differ_by_the_order_of_a_sum() -> None:
    pytest.importorskip("cv2")
    image = in_format(_deep(_grey()), Channels(1, (0, 65535)))
    for sigma in (0.1, 0.5, 2.0):
        recipe = CropRecipe(BOX, SIZE, blur=(9, sigma))
        torch.testing.assert_close(
            *(render_channels(image, recipe, blur) for blur in BLURS.values()), atol=1e-5, rtol=0
        )


def _multi_crop(backend: str, *overrides: Any) -> MultiCrop:
    cfg = get_cfg()
    cfg.merge_from_list(
        ["INPUT.AUGMENTATION_BACKEND", backend, "INPUT.COLOR_JITTER.PROB", 1.0, "INPUT.GRAYSCALE_PROB", 1.0]
    )
    cfg.merge_from_list(["INPUT.GLOBAL_CROPS.SIZE_PX", (64,), "INPUT.LOCAL_CROPS.SIZE_PX", (32,), *overrides])
    return MultiCrop(cfg)


def test_multi_crop_leaves_out_what_needs_colours(backend: str) -> None:
    statistics = ("MODEL.PIXEL_MEAN", (0.5,) * 3, "MODEL.PIXEL_STD", (0.5,) * 3)
    augmentation = _multi_crop(backend, "INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (0, 255), *statistics)
    recipes = [r for p in range(20) for r in augmentation.recipes((100, 120), position_rng(0, p, CROPS))]
    assert {name for recipe in recipes for name, _ in recipe.jitter} == {"brightness", "contrast"}
    assert not any(recipe.grey for recipe in recipes)
    photograph = np.asarray(load_sample_image("flower.jpg"))
    global_crops, local_crops = augmentation(photograph, position_rng(0, 0, CROPS))
    assert [(c.shape, c.dtype) for c in (global_crops[0], local_crops[0])] == [
        ((3, 64, 64), torch.float32),
        ((3, 32, 32), torch.float32),
    ]
    assert all(0 <= crop.min() <= crop.max() <= 1 for crop in global_crops + local_crops)


def test_the_same_random_numbers_are_drawn_for_every_format() -> None:
    """So that a position has the same crops whatever the format."""
    statistics = ("MODEL.PIXEL_MEAN", (0.5,) * 5, "MODEL.PIXEL_STD", (0.5,) * 5)
    in_channels = _multi_crop("reference", "INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (0, 1), *statistics)
    for recipe, of_colours in zip(
        *(m.recipes((90, 70), position_rng(0, 3, CROPS)) for m in (in_channels, _multi_crop("reference"))), strict=True
    ):
        assert (recipe.box, recipe.flip, recipe.blur) == (of_colours.box, of_colours.flip, of_colours.blur)


def _rgba() -> Image.Image:
    colours = load_sample_image("flower.jpg")
    alpha = np.add.outer(np.arange(colours.shape[0]), np.arange(colours.shape[1])) % 256
    return Image.fromarray(np.dstack([colours, alpha.astype(np.uint8)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rgba_is_the_crop_of_its_colours_and_of_its_alpha(backend: str) -> None:
    recipe = CropRecipe(BOX, SIZE, True, (("hue", 0.1), ("saturation", 1.2)), True, (9, 1.0), 128)
    (found,) = render_crops(_rgba(), [recipe], backend)
    (colours,) = render_crops(_rgba().convert("RGB"), [recipe], backend)
    (alpha,) = render_crops(_rgba().getchannel("A"), [CropRecipe(BOX, SIZE, True, blur=(9, 1.0))], backend)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.cat([colours, alpha]))


def test_multi_crop_of_rgba_has_every_operation_of_colours() -> None:
    statistics = ("MODEL.PIXEL_MEAN", (0.5,) * 4, "MODEL.PIXEL_STD", (0.5,) * 4)
    augmentation = _multi_crop("reference", "INPUT.FORMAT", "RGBA", *statistics)
    recipes = augmentation.recipes((100, 100), position_rng(0, 0, CROPS))
    assert all(recipe.grey and len(recipe.jitter) == 4 for recipe in recipes)
    crops: list[Tensor] = sum(augmentation(_rgba(), position_rng(0, 0, CROPS)), [])
    assert {(crop.shape[0], crop.dtype) for crop in crops} == {(4, torch.uint8)}
