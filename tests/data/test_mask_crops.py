from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.config import CfgNode
from dinoengine.data import DataError, build_dataset, build_mask_train_loader, build_test_loader
from dinoengine.data.augmentation import CenterCropTransform
from dinoengine.data.mask_crops import MaskCrop
from dinoengine.structures import IGNORE
from tests.masks import write_mask_folder

# A mask that is its own image: crops of both show whether they are of the same place.
RNG = np.random.default_rng(0)
BLOCKS = np.kron(RNG.integers(0, 2, (12, 9)).astype(np.uint8), np.ones((8, 8), dtype=np.uint8))  # [96, 72]


def _as_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask * 200)


def _crop(**options: object) -> MaskCrop:
    settings = {"resize_px": 0, "crop_size": (24, 40), "resize_ratio": (1.0, 1.0), "hflip_prob": 0.0, **options}
    return MaskCrop("L", **settings)  # type: ignore[arg-type]


def _agreement(image: torch.Tensor, mask: torch.Tensor) -> float:
    known = mask != IGNORE
    return ((image[0] > 100) == (mask == 1))[known].float().mean().item()


@pytest.mark.parametrize("options", [{}, {"hflip_prob": 1.0}, {"resize_ratio": (0.5, 2.0)}, {"resize_px": 100}])
def test_image_and_mask_are_cropped_alike(options: dict[str, object]) -> None:
    crop = _crop(**options)
    rng = np.random.default_rng(1)
    masks = []
    for _ in range(20):
        image, mask = crop(_as_image(BLOCKS), BLOCKS, rng)
        assert (image.shape, mask.shape) == ((1, 24, 40), (24, 40))
        assert image.dtype == mask.dtype == torch.uint8
        assert _agreement(image, mask) > (
            0.999 if "resize_ratio" not in options and "resize_px" not in options else 0.93
        )
        masks.append(mask)
    assert any(not torch.equal(mask, masks[0]) for mask in masks)


def test_a_flip_is_the_mirror_image() -> None:
    plain = _crop()(_as_image(BLOCKS), BLOCKS, np.random.default_rng(4))
    flipped = _crop(hflip_prob=1.0)(_as_image(BLOCKS), BLOCKS, np.random.default_rng(4))
    for one, other in zip(plain, flipped, strict=True):
        assert torch.equal(one.flip(-1), other)


def test_what_is_smaller_than_the_crop_is_extended_by_ignored_black() -> None:
    image, mask = _crop(resize_ratio=(0.25, 0.25))(_as_image(np.ones_like(BLOCKS)), np.ones_like(BLOCKS), RNG)
    assert mask[:, :18].unique().tolist() == [1]  # 72 columns become 18; 96 rows become 24, all of the crop
    assert mask[:, 18:].unique().tolist() == [IGNORE]
    assert image[0, :, :18].unique().tolist() == [200]
    assert image[0, :, 18:].unique().tolist() == [0]


@pytest.mark.parametrize("resize_px, crop_size", [(0, (24, 40)), (48, (32, 32)), (0, (200, 100)), (30, (96, 10))])
def test_the_evaluation_crop_of_a_mask_is_that_of_its_image(resize_px: int, crop_size: tuple[int, int]) -> None:
    transform = CenterCropTransform("L", resize_px, crop_size)
    image, mask = transform(_as_image(BLOCKS)), transform.mask(BLOCKS)
    assert mask.shape == crop_size
    assert set(mask.unique().tolist()) <= {0, 1}  # nearest neighbour invents no class
    assert _agreement(image, mask) > 0.93


def test_loaders_give_masks_where_there_are_some(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    text = write_mask_folder(tmp_path, 5)
    tiny_cfg.merge_from_list(["INPUT.TEST.CROP_SIZE_PX", 16, "INPUT.TEST.RESIZE_PX", 0, "TEST.IMS_PER_BATCH", 3])
    batches = list(build_test_loader(tiny_cfg, text))
    dataset = build_dataset(text)
    assert [batch.masks.shape for batch in batches] == [(3, 16, 16), (2, 16, 16)]
    assert batches[1].masks[1].numpy().tolist() == dataset.load_mask(4)[8:24, 8:24].tolist()
    assert next(iter(build_test_loader(tiny_cfg, "synthetic:num_images=2"))).masks is None

    options = {"batch_size": 2, "resize_ratio": (0.5, 2.0), "hflip_prob": 0.5}
    loaders = [build_mask_train_loader(tiny_cfg, dataset, seed=seed, **options) for seed in (0, 0, 1)]
    first, again, other = (next(iter(loader)) for loader in loaders)
    assert first.masks.shape == (2, 16, 16)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_a_mask_that_cannot_be_used_is_named_with_its_image(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    text = write_mask_folder(tmp_path, 2)
    Image.new("L", (3, 3)).save(tmp_path / "masks" / "01.png")
    message = r"cropping .*images/01\.png failed: The mask .*masks/01\.png has 3 x 3 pixels"
    with pytest.raises(DataError, match=message):
        list(build_test_loader(tiny_cfg, text))
    loader = build_mask_train_loader(
        tiny_cfg, build_dataset(text), batch_size=2, resize_ratio=(1.0, 1.0), hflip_prob=0.0, seed=0
    )
    with pytest.raises(DataError, match=message):
        next(iter(loader))
