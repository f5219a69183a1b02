"""Operations on many crops at once against those of the published pipeline, one crop at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from dinoengine.data.batched_colour import OPERATIONS
from dinoengine.data.crop_recipe import CropRecipe, render_reference, to_tensor

SIZE = (60, 70)
FACTORS = (0.0, 0.6, 0.83, 1.0, 1.17, 1.4, 2.0)
TURNS = (-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.5)


def _images(mode: str = "RGB") -> list[Image.Image]:
    """A photograph, noise, one colour, and black: more crops than one, all different."""
    rng = np.random.default_rng(0)
    arrays = [
        np.ascontiguousarray(load_sample_image("flower.jpg")[180:240, 200:270]),
        rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
        np.full((*SIZE, 3), (10, 200, 90), dtype=np.uint8),
        np.zeros((*SIZE, 3), dtype=np.uint8),
    ]
    return [Image.fromarray(array).convert(mode) for array in arrays]


def _differences(operation: str, values: list[tuple[float, ...]], recipe: dict[str, Any], mode: str = "RGB") -> Tensor:
    """Of all images done together, each with its own values, and of the reference: absolute, [n, C, H, W]."""
    images = _images(mode)
    crops = torch.stack([to_tensor(image) for image in images])
    told = torch.tensor(values * len(images) if len(values) == 1 else values).view(len(images), -1)
    before = crops.clone()
    found = OPERATIONS[operation](crops, told)
    assert torch.equal(crops, before)
    assert found.dtype == torch.uint8
    expected = [render_reference(image, CropRecipe((0, 0, *SIZE), SIZE, **recipe)) for image in images]
    return (found.int() - torch.stack(expected).int()).abs()


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_blends_are_pillows_to_the_bit(operation: str, factor: float) -> None:
    assert _differences(operation, [(factor,)], {"jitter": ((operation, factor),)}).max() == 0


@pytest.mark.parametrize("operation", ["brightness", "contrast"])
def test_blends_of_grey_images_are_too(operation: str) -> None:
    assert _differences(operation, [(1.3,)], {"jitter": ((operation, 1.3),)}, mode="L").max() == 0


@pytest.mark.parametrize("turn", TURNS)
def test_hue_is_pillows_to_the_bit(turn: float) -> None:
    assert _differences("hue", [(int(turn * 255) % 256,)], {"jitter": (("hue", turn),)}).max() == 0


def test_hue_of_every_colour_of_a_grid() -> None:
    levels = np.array([*range(0, 256, 5), 1, 2, 127, 128, 254], dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    image = Image.fromarray(np.ascontiguousarray(grid))
    size = image.height, image.width
    expected = render_reference(image, CropRecipe((0, 0, *size), size, jitter=(("hue", 0.07),)))
    found = OPERATIONS["hue"](to_tensor(image)[None], torch.tensor([[float(int(0.07 * 255))]]))[0]
    assert torch.equal(found, expected)


def test_grey_flip_and_solarize_are_the_references_to_the_bit() -> None:
    nothing: list[tuple[float, ...]] = [(), (), (), ()]
    assert _differences("grey", nothing, {"grey": True}).max() == 0
    assert _differences("flip", nothing, {"flip": True}).max() == 0
    for threshold in (0, 1, 128, 255):
        assert _differences("solarize", [(threshold,)], {"solarize": threshold}).max() == 0


@pytest.mark.parametrize("kernel, sigma", [(9, 0.1), (9, 0.27), (9, 0.5), (9, 1.0), (9, 2.0), (5, 2.0), (1, 1.0)])
def test_blur_differs_where_a_sum_lies_between_two_levels(kernel: int, sigma: float) -> None:
    weights = [math.exp(-0.5 * ((i - kernel // 2) / sigma) ** 2) for i in range(kernel)]
    difference = _differences("blur", [tuple(w / sum(weights) for w in weights)], {"blur": (kernel, sigma)})
    assert difference.max() <= 1
    assert difference.float().mean() < 2e-4


def test_each_crop_has_its_own_values_and_does_not_know_the_others() -> None:
    crops = torch.stack([to_tensor(image) for image in _images()])
    rng = np.random.default_rng(1)
    widths = {"flip": 0, "grey": 0, "blur": 5}
    assert list(OPERATIONS) == ["flip", "brightness", "contrast", "saturation", "hue", "grey", "blur", "solarize"]
    for name, operation in OPERATIONS.items():
        values = torch.from_numpy(rng.uniform(0.1, 1.5, (len(crops), widths.get(name, 1))).astype(np.float32))
        values = values.round() * 40 if name in ("hue", "solarize") else values
        alone = [operation(crops[i : i + 1], values[i : i + 1]) for i in range(len(crops))]
        assert torch.equal(operation(crops, values), torch.cat(alone)), name
