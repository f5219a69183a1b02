"""The reference making of a recipe: torchvision's operations, each with the recipe's numbers, in the published order."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from dinoengine.data.crop_recipe import CropRecipe, render_reference, to_tensor


def _noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(mode)


def test_the_reference_is_written_out_by_hand():
    jitter = (("hue", -0.1), ("brightness", 1.3), ("saturation", 0.8), ("contrast", 0.7))
    recipe = CropRecipe((3, 5, 30, 20), (16, 24), True, jitter, True, (5, 1.2), 100)
    image = _noise().crop((5, 3, 25, 33)).resize((24, 16), Image.Resampling.BICUBIC)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = F.adjust_brightness(F.adjust_hue(image, -0.1), 1.3)
    image = F.adjust_contrast(F.adjust_saturation(image, 0.8), 0.7)
    image = Image.merge("RGB", [image.convert("L")] * 3)
    image = F.gaussian_blur(image, [5, 5], [1.2, 1.2])
    expected = torch.from_numpy(np.array(image.point(lambda level: level if level < 100 else 255 - level)))
    assert torch.equal(render_reference(_noise(), recipe), expected.permute(2, 0, 1))


def test_a_recipe_of_a_box_alone_is_a_resized_crop():
    image = _noise("L")
    crop = render_reference(image, CropRecipe((0, 10, 40, 30), (8, 9)))
    assert crop.shape == (1, 8, 9)
    assert torch.equal(crop[0], to_tensor(F.resized_crop(image, 0, 10, 40, 30, [8, 9], InterpolationMode.BICUBIC))[0])


def test_a_tensor_has_memory_of_its_own():
    image = _noise()
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 40, 50), torch.uint8, True)
    assert tensor[1, 2, 3] == image.getpixel((3, 2))[1]  # type: ignore[index]
    tensor.zero_()
    assert np.asarray(image).any()
