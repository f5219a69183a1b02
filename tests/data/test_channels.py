"""INPUT.FORMAT from file to batch: what the model gets is the stored value over INPUT.VALUE_RANGE."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.config import CfgNode
from dinoengine.data import (
    DATASET_REGISTRY,
    ConcatImageDataset,
    ImageDataset,
    build_dataset,
    build_test_loader,
    build_train_loader,
)
from dinoengine.data.augmentation import CenterCropTransform
from dinoengine.data.channels import Channels, image_format, in_format, num_array_channels, size_of
from dinoengine.data.mask_crops import MaskCrop
from dinoengine.structures import IGNORE

DEEP = Channels(2, (0, 65535))


def _channels_cfg(cfg: CfgNode, folder: Path, channels: int = 5, value_range: Any = (0, 65535)) -> CfgNode:
    cfg.merge_from_list(["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", value_range])
    cfg.merge_from_list(["MODEL.PIXEL_MEAN", (0.5,) * channels, "MODEL.PIXEL_STD", (0.25,) * channels])
    cfg.merge_from_list(
        ["DATASETS.TRAIN", f"folder:{folder}:arrays=true", "DATASETS.TEST", f"folder:{folder}:arrays=true"]
    )
    return cfg


def test_values_map_to_0_and_1_and_none_of_16_bits_is_lost() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = in_format(levels, Channels(1, (0, 65535)))
    assert (found.dtype, found.shape) == (torch.float32, (1, 256, 256))
    assert len(found.unique()) == 65536
    assert (found.min(), found.max()) == (0, 1)
    assert np.array_equal((found[0] * 65535).round().numpy(), levels)


def test_the_range_is_linear_within_and_cut_beyond() -> None:
    values = np.array([[50, 100, 150, 300, 5000]], dtype=np.int32)
    assert in_format(values, Channels(1, (100, 300))).tolist() == [[[0, 0, 0.25, 1, 1]]]
    assert in_format(values.astype(">u2"), Channels(1, (100, 300))).tolist() == [[[0, 0, 0.25, 1, 1]]]
    assert in_format(np.array([[-1.0, 0, 1]]), Channels(1, (-1, 1))).tolist() == [[[0, 0.5, 1]]]


def test_the_image_of_the_dataset_is_not_changed() -> None:
    values = np.ones((3, 4, 1), dtype=np.float32)
    in_format(values, Channels(1, (0, 2)))
    assert (values == 1).all()


def test_pictures_of_a_dataset_in_memory_count_as_well() -> None:
    picture = Image.fromarray(np.full((2, 3), 65535, dtype=np.uint16))
    assert in_format(picture, Channels(1, (0, 65535))).tolist() == [[[1.0] * 3] * 2]
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3\), and INPUT.FORMAT channels needs 2"):
        in_format(Image.new("RGB", (3, 2)), DEEP)


def test_an_array_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"array of shape \(2, 3\) needs INPUT.FORMAT channels; RGB is for pictures"):
        in_format(np.zeros((2, 3), dtype=np.uint8), "RGB")


def test_rgba_keeps_colours_and_alpha_as_they_are_stored() -> None:
    image = in_format(Image.new("RGBA", (2, 1), (200, 100, 50, 0)), "RGBA")
    assert np.asarray(image).tolist() == [[[200, 100, 50, 0]] * 2]
    assert np.asarray(in_format(Image.new("L", (1, 1), 7), "RGBA")).tolist() == [[[7, 7, 7, 255]]]


def test_what_a_config_asks_for(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    assert image_format(tiny_cfg) == "RGB"
    assert num_array_channels("RGB") == 0
    wanted = image_format(_channels_cfg(tiny_cfg, tmp_path))
    assert wanted == Channels(5, (0, 65535))
    assert num_array_channels(wanted) == 5
    assert size_of(torch.zeros(5, 3, 4)) == size_of(Image.new("L", (4, 3))) == (3, 4)


def test_the_evaluation_crop_and_the_crop_with_a_mask_keep_16_bits() -> None:
    """A region that keeps its size is copied, whatever the channels."""
    values = np.random.default_rng(0).integers(0, 65536, (6, 8, 2), dtype=np.uint16)
    crop = CenterCropTransform(DEEP, 0, (4, 4))(values)
    assert np.array_equal((crop * 65535).round().permute(1, 2, 0).numpy(), values[1:5, 2:6])
    mask = np.ones((6, 8), dtype=np.uint8)
    make = MaskCrop(DEEP, resize_px=0, crop_size=(9, 8), resize_ratio=(1, 1), hflip_prob=0)
    image, classes = make(values, mask, np.random.default_rng(0))
    assert np.array_equal((image[:, :6] * 65535).round().permute(1, 2, 0).numpy(), values)
    assert image[:, 6:].max() == 0
    assert classes.unique().tolist() == [1, IGNORE]


def test_resized_crops_stay_within_0_and_1() -> None:
    """Bicubic weights overshoot at edges; 8 bits would be cut there."""
    values = np.zeros((16, 16, 2), dtype=np.uint16)
    values[:, 8:] = 65535
    crop = CenterCropTransform(DEEP, 32, (32, 32))(values)
    assert (crop.min(), crop.max()) == (0, 1)
    grey = CenterCropTransform("L", 32, (32, 32))(Image.fromarray((values[..., 0] >> 8).astype(np.uint8)))
    assert (crop[0] - grey[0] / 255).abs().max() < 1.5 / 255


def test_the_evaluation_crop_of_rgba_does_not_mix_alpha_into_colours() -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[:, 4:, 3] = 255
    crop = CenterCropTransform("RGBA", 4, (4, 4))(Image.fromarray(pixels))
    assert crop.shape == (4, 4, 4)
    assert crop[0].unique().tolist() == [200]
    assert (crop[3, 0, 0], crop[3, 0, 3]) == (0, 255)


def test_arrays_come_as_batches_of_floats(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", rng.integers(0, 65536, (12, 12, 5), dtype=np.uint16))
    (tmp_path / "preview.png").touch()
    cfg = _channels_cfg(tiny_cfg, tmp_path)
    batch = next(iter(build_train_loader(cfg)))
    assert (batch.global_crops.dtype, batch.global_crops.shape) == (torch.float32, (8, 5, 8, 8))
    assert (batch.local_crops.dtype, batch.local_crops.shape) == (torch.float32, (8, 5, 4, 4))
    assert 0 <= batch.global_crops.min() <= batch.global_crops.max() <= 1
    cfg.INPUT.TEST.RESIZE_PX, cfg.INPUT.TEST.CROP_SIZE_PX = 0, (12,)
    images = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST))).images
    assert np.array_equal((images[0] * 65535).round().permute(1, 2, 0).numpy(), np.load(tmp_path / "0.npy"))


def test_a_folder_lists_arrays_where_it_is_asked_to(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(FileNotFoundError, match=r"1 x .npy.*Arrays are listed with folder:...:arrays=true"):
        build_dataset(f"folder:{tmp_path}")
    Image.new("L", (2, 2)).save(tmp_path / "b.png")
    assert [len(build_dataset(f"folder:{tmp_path}{keys}")) for keys in ("", ":arrays=true")] == [1, 1]
    assert build_dataset(f"folder:{tmp_path}").describe(0).endswith("b.png")
    (tmp_path / "a.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no image; found 1 x .png. Accepted extensions: .npy"):
        build_dataset(f"folder:{tmp_path}:arrays=true")


def test_an_image_with_other_channels_is_a_bad_image(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """Found while it is loaded, so that it is replaced and counted like any other bad file."""
    for i, channels in enumerate((5, 5, 3, 5)):
        np.save(tmp_path / f"{i}.npy", np.zeros((12, 12, channels), dtype=np.uint16))
    batch = next(iter(build_train_loader(_channels_cfg(tiny_cfg, tmp_path), replace_bad_images=True)))
    assert [(Path(bad.path).name, "needs 5 channel" in bad.cause) for bad in batch.bad_images] == [("2.npy", True)]


def test_a_dataset_of_yours_may_load_arrays(tiny_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stacks(ImageDataset):
        def __len__(self) -> int:
            return 3

        def load(self, index: int) -> Any:
            return np.full((8, 8, 5), 1000 * index, dtype=np.uint16)

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "stacks", Stacks)
    cfg = _channels_cfg(tiny_cfg, tmp_path, value_range=(0, 2000))
    images = next(iter(build_test_loader(cfg, "stacks"))).images
    assert [image.unique().tolist() for image in images] == [[0.0], [0.5], [1.0]]


def test_datasets_made_of_others_pass_on_how_files_are_read(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), 1).save(tmp_path / name / "0.png")
    masks = build_dataset(f"masks:{tmp_path}:num_classes=2")
    both = ConcatImageDataset([masks, build_dataset(f"folder:{tmp_path}/images")])
    both.load_channels(1)
    assert [both.load(i).shape for i in range(2)] == [(4, 4, 1)] * 2
    assert masks.load_mask(0).tolist() == [[1] * 4] * 4, "a mask stays a picture"  # type: ignore[union-attr]
    both.load_channels(0)
    assert both.load(0).mode == "L"


def test_tar_members_are_read_with_all_channels(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(levels).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        shard.add(tmp_path / "a.png", "a.png")
    dataset = build_dataset(f"wds:{tmp_path}/0.tar")
    dataset.load_channels(1)
    assert np.array_equal(dataset.load(0)[..., 0], levels)
