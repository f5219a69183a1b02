"""CenterCropTransform, and the conversion of image modes that both augmentations share."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from dinoengine.data import CenterCropTransform
from dinoengine.data.crop_recipe import to_tensor
from dinoengine.data.decode import to_format


def _photo(rows: int, columns: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8))


def _torchvision(resize: int, crop: tuple[int, int]) -> T.Compose:
    return T.Compose([T.Resize(resize, InterpolationMode.BICUBIC), T.CenterCrop(crop), T.PILToTensor()])


# ---- CenterCropTransform


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (32, 32), (33, 32), (57, 57), (20, 100), (10, 10)], ids=str)
@pytest.mark.parametrize("resize, crop", [(32, (28, 28)), (32, (32, 32)), (32, (21, 30))], ids=str)
def test_it_is_resize_and_center_crop_of_torchvision(size: tuple[int, int], resize: int, crop: tuple[int, int]):
    image = _photo(*size)
    found = CenterCropTransform("RGB", resize, crop)(image)
    assert found.dtype == torch.uint8
    assert torch.equal(found, _torchvision(resize, crop)(image))


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (300, 301)], ids=str)
def test_the_longer_side_is_cut_to_whole_pixels_as_torchvision_does(size: tuple[int, int]):
    image = _photo(*size)
    assert torch.equal(CenterCropTransform("RGB", 256, (224, 224))(image), _torchvision(256, (224, 224))(image))


def test_resize_0_leaves_the_pixels():
    image = _photo(30, 41)
    crop = CenterCropTransform("RGB", 0, (16, 20))(image)
    assert torch.equal(crop, T.PILToTensor()(T.CenterCrop((16, 20))(image)))
    whole = CenterCropTransform("RGB", 0, (30, 41))(image)
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_digit_is_enlarged_the_same_with_and_without_resize():
    image = _photo(8, 8).convert("L")
    expected = T.PILToTensor()(image.resize((16, 16), Image.Resampling.BICUBIC))
    for resize_px in (0, 8, 16):
        crop = CenterCropTransform("L", resize_px, (16, 16))(image)
        assert crop.shape == (1, 16, 16)
        assert torch.equal(crop, expected)


@pytest.mark.parametrize("resize_px", [0, 5, 16, 40])
def test_every_size_of_image_fills_the_crop(resize_px: int):
    """No padding: a white image stays white to the corners."""
    rng = np.random.default_rng(0)
    for rows, columns in [(1, 1), (1, 30), (30, 1), *rng.integers(1, 60, (40, 2)).tolist()]:
        crop_size = (int(rng.integers(1, 25)), int(rng.integers(1, 25)))
        crop = CenterCropTransform("L", resize_px, crop_size)(Image.new("L", (columns, rows), 255))
        assert crop.shape == (1, *crop_size)
        assert crop.min() == 255, (rows, columns, crop_size)


def test_an_enlarged_image_keeps_its_proportions():
    """A 10 x 40 image on a crop of 20 x 20: scaled by 2, the middle half of the columns is seen."""
    columns = np.repeat(np.arange(40, dtype=np.uint8)[None] * 6, 10, axis=0)
    crop = CenterCropTransform("L", 0, (20, 20))(Image.fromarray(columns)).float()[0]
    assert crop[:, 0].mean() == pytest.approx(15 * 6, abs=3)
    assert crop[:, -1].mean() == pytest.approx(24 * 6, abs=3)


def test_a_pickled_copy_does_the_same():
    transform, image = CenterCropTransform("RGB", 20, (16, 16)), _photo(30, 40)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))


# ---- image modes


@pytest.mark.parametrize("target", ["RGB", "L"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_all_modes_are_converted(mode: str, target: str):
    assert to_format(Image.new(mode, (3, 2)), target).mode == target


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_plain_modes_are_converted_as_pillow_does(mode: str):
    image = _photo(9, 7).convert(mode)
    for target in ("RGB", "L"):
        assert np.array_equal(np.asarray(to_format(image, target)), np.asarray(image.convert(target)))


def test_an_image_in_the_format_is_not_copied():
    image = _photo(2, 2)
    assert to_format(image, "RGB") is image


@pytest.mark.parametrize("dtype, mode", [(np.uint16, "I;16"), (np.dtype(">u2"), "I;16B"), (np.int32, "I")], ids=str)
def test_16_bit_greys_keep_their_range(dtype: np.dtype, mode: str):
    """Pillow's own conversion would cut everything above 255 to white."""
    image = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype=dtype))
    assert image.mode == mode
    assert np.asarray(to_format(image, "L")).tolist() == [[0, 0, 1, 128, 255]]
    assert np.asarray(to_format(image, "RGB"))[0, 3].tolist() == [128] * 3


def test_transparency_is_laid_on_black():
    rgba = Image.new("RGBA", (1, 1), (200, 100, 50, 0))
    assert np.asarray(to_format(rgba, "RGB"))[0, 0].tolist() == [0, 0, 0]
    half = Image.new("RGBA", (1, 1), (200, 100, 50, 128))
    assert np.asarray(to_format(half, "RGB"))[0, 0] == pytest.approx([100, 50, 25], abs=1)
    opaque = Image.new("RGBA", (1, 1), (200, 100, 50, 255))
    assert np.asarray(to_format(opaque, "RGB"))[0, 0].tolist() == [200, 100, 50]
    assert np.asarray(to_format(Image.new("LA", (1, 1), (200, 0)), "L")).tolist() == [[0]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([200, 100, 50])
    assert np.asarray(to_format(palette, "RGB"))[0, 0].tolist() == [200, 100, 50]
    palette.info["transparency"] = 0
    assert np.asarray(to_format(palette, "RGB"))[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode, colour", [("RGB", (255, 0, 255)), ("L", 200)])
def test_a_transparent_colour_is_laid_on_black(mode: str, colour: int | tuple[int, int, int]):
    image = Image.new(mode, (1, 1), colour)
    image.info["transparency"] = colour
    assert np.asarray(to_format(image, mode)).max() == 0


def test_to_tensor_has_channels_first_and_memory_of_its_own():
    image = _photo(3, 5)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 3, 5)
    assert torch.equal(tensor, T.PILToTensor()(image))
    tensor.zero_()
    assert np.asarray(image).max() > 0
    assert to_tensor(image.convert("L")).shape == (1, 3, 5)
