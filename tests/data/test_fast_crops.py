"""The fast backend against the reference, on the same recipes: operation by operation, then whole crops."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision import transforms as T

from dinoengine.data.crop_recipe import CropRecipe, render_reference
from dinoengine.data.fast_crops import opencv, render_fast

pytest.importorskip("cv2")

WHOLE = (0, 0, 64, 80)


def _image(kind: str) -> np.ndarray:
    if kind == "photograph":
        return np.ascontiguousarray(load_sample_image("china.jpg")[100:400, 150:550])
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def _difference(image: np.ndarray, recipe: CropRecipe) -> np.ndarray:
    """Fast minus reference, [C, rows, columns]."""
    reference, fast = render_reference(Image.fromarray(image), recipe), render_fast(image, recipe)
    assert (fast.shape, fast.dtype) == (reference.shape, torch.uint8)
    return fast.numpy().astype(int) - reference.numpy()


def _op(**operation: Any) -> CropRecipe:
    """A region of its own size, and one operation."""
    return CropRecipe((20, 30, *WHOLE[2:]), WHOLE[2:], **operation)


JITTER_FACTORS = [
    (name, factor)
    for name in ("brightness", "contrast", "saturation")
    for factor in (0.0, 0.6, 0.83, 1.0, 1.17, 1.4, 2.0)
]


# (operation, largest mean absolute difference, largest difference), in levels of 0..255; of any picture.
OPERATIONS: list[tuple[dict[str, Any], float, int]] = [
    ({}, 0.0, 0),
    ({"flip": True}, 0.0, 0),
    ({"grey": True}, 0.01, 1),
    *[({"jitter": (step,)}, 0.02, 1) for step in JITTER_FACTORS],
    *[({"jitter": (("hue", factor),)}, 1.3, 16) for factor in (-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.5)],
    *[({"blur": (9, sigma)}, 0.5, 2) for sigma in (0.1, 0.26, 0.27, 0.28, 0.5, 0.54, 0.8, 1.08, 1.5, 2.0)],
    *[({"blur": (5, sigma)}, 0.3, 1) for sigma in (0.3, 2.0)],
    *[({"solarize": threshold}, 0.0, 0) for threshold in (0, 1, 128, 255)],
]


@pytest.mark.parametrize("kind", ["photograph", "noise"])
@pytest.mark.parametrize("operation, mean, most", OPERATIONS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_an_operation_is_the_reference_but_for_rounding(operation: dict[str, Any], mean: float, most: int, kind: str):
    difference = np.abs(_difference(_image(kind), _op(**operation)))
    assert difference.mean() <= mean
    assert difference.max() <= most


@pytest.mark.parametrize("step", JITTER_FACTORS, ids=str)
def test_no_operation_makes_a_photograph_brighter_or_darker(step: tuple[str, float]):
    """Pillow cuts fractions off where OpenCV rounds: half a level on average if nothing were done about it."""
    assert abs(_difference(_image("photograph"), _op(jitter=(step,))).mean()) < 0.01


def test_hue_is_as_close_to_the_exact_rotation_as_the_reference():
    """Both keep hue and saturation in 8 bits. The exact one: fractions all the way, the same angle."""
    image, factor = _image("photograph")[:64, :80], 0.1
    turned = int(factor * 255) / 255
    exact = np.array(
        [
            colorsys.hsv_to_rgb((h + turned) % 1.0, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255)
        ]
    )
    recipe = CropRecipe(WHOLE, WHOLE[2:], jitter=(("hue", factor),))
    errors = {}
    for name, crop in (
        ("reference", render_reference(Image.fromarray(image), recipe)),
        ("fast", render_fast(image, recipe)),
    ):
        errors[name] = np.abs(crop.permute(1, 2, 0).reshape(-1, 3).numpy() - 255 * exact).mean()
    assert errors["fast"] < errors["reference"] < 1.5, errors


# Box -> largest mean absolute and largest difference, of a photograph. Where one edge grows and the other shrinks Pillow
# takes the passes, each of which rounds and cuts at 0 and 255, in the other order.
BOXES = {
    (0, 0, 300, 400): (0.02, 1),
    (5, 7, 120, 60): (0.35, 8),
    (5, 7, 60, 120): (0.35, 8),
    (5, 7, 33, 21): (0.02, 1),
    (299, 399, 1, 1): (0.0, 0),
    (3, 3, 1, 50): (0.02, 1),
    (3, 3, 50, 1): (0.02, 1),
    (100, 0, 96, 80): (0.0, 0),
}


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_region_is_resized_as_pillow_does(box: tuple[int, int, int, int], mode: str):
    image = np.array(Image.fromarray(_image("photograph")).convert(mode))
    difference = np.abs(_difference(image, CropRecipe(box, (96, 80))))
    mean, most = BOXES[box]
    assert difference.mean() <= mean
    assert difference.max() <= most


def test_pixels_outside_the_box_do_not_count():
    image = _image("photograph")
    recipe = CropRecipe((50, 60, 90, 100), (64, 64), jitter=(("contrast", 0.7),), blur=(9, 2.0))
    elsewhere = np.full_like(image, 255)
    elsewhere[50:140, 60:160] = image[50:140, 60:160]
    assert torch.equal(render_fast(image, recipe), render_fast(elsewhere, recipe))


def test_grey_images_keep_one_channel_and_are_those_of_the_reference():
    image = _image("photograph")[..., 0].copy()
    recipe = CropRecipe(
        (10, 10, 200, 150), (96, 96), True, (("contrast", 0.7), ("brightness", 1.2)), blur=(9, 1.0), solarize=128
    )
    assert render_fast(image, recipe).shape == (1, 96, 96)
    assert (np.abs(_difference(image, recipe)) > 1).mean() < 0.01


def test_the_image_is_not_changed_and_no_memory_is_shared():
    image = _image("noise")
    before, recipe = image.copy(), CropRecipe((0, 0, 300, 400), (300, 400), jitter=(("hue", 0.1),))
    image.setflags(write=False)  # as that of a PIL image is
    for made in (recipe, CropRecipe((0, 0, 300, 400), (300, 400))):
        crop = render_fast(image, made)
        assert crop.is_contiguous()
        crop.zero_()
    assert np.array_equal(image, before)


def test_crops_do_not_depend_on_what_was_rendered_before():
    image, rng = _image("photograph"), np.random.default_rng(0)
    recipes = [
        CropRecipe(
            (i, 2 * i, 100 + i, 90), (48, 48), bool(i % 2), (("hue", 0.02 * i), ("contrast", 0.9)), blur=(9, 1.0)
        )
        for i in range(5)
    ]
    first = [render_fast(image, recipe) for recipe in recipes]
    for i in rng.permutation(5):
        assert torch.equal(render_fast(image, recipes[i]), first[i])


def test_opencv_starts_no_threads_of_its_own():
    assert opencv().getNumThreads() == 1


def test_all_operations_together_are_a_torchvision_pipeline():
    """Against the classes of torchvision themselves, each made certain."""
    image = _image("photograph")[:96, :96]
    recipe = CropRecipe((0, 0, 96, 96), (96, 96), True, (), True, (9, 1.0), 128)
    expected = T.Compose(
        [
            T.RandomHorizontalFlip(1.0),
            T.RandomGrayscale(1.0),
            T.GaussianBlur(9, (1.0, 1.0)),
            T.RandomSolarize(128, 1.0),
            T.PILToTensor(),
        ]
    )(Image.fromarray(image))
    difference = (render_fast(image, recipe).int() - expected.int()).abs()
    # A level's difference next to the threshold is inverted on one side only.
    assert (difference > 1).float().mean() < 0.01
