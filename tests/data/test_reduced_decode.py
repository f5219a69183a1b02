from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import MultiCrop, SingleCrop, build_train_loader
from dinoengine.data.crop_recipe import CropRecipe
from dinoengine.data.decode import read_image
from dinoengine.data.reduced_decode import asking, largest_factor, scaled, whole_size

pytest.importorskip("cv2")


def _photograph(path: Path, rows: int, columns: int, orientation: int = 1) -> str:
    """A smooth picture, each place of which has a colour of its own; (rows, columns) as stored."""
    y, x = np.mgrid[:rows, :columns]
    pixels = np.stack((255 * x / columns, 255 * y / rows, 127 + 60 * np.sin(x / 90) * np.cos(y / 70)), axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95, exif=exif)
    return str(path)


def _cfg(*overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.AUGMENTATION_BACKEND=fast", "INPUT.REDUCED_DECODE=True", *overrides])
    return cfg


@pytest.mark.parametrize("factor, size", [(1, (103, 201)), (2, (52, 101)), (4, (26, 51)), (8, (13, 26))])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_at_the_scale_that_is_asked_for(
    tmp_path: Path, factor: int, size: tuple[int, int], orientation: int
) -> None:
    path = _photograph(tmp_path / "1.jpg", 103, 201, orientation)
    upright = (lambda pair: pair[::-1]) if orientation == 6 else (lambda pair: pair)
    asked = []
    with asking(lambda whole: asked.append(whole) or factor):
        image = read_image(path)
    assert asked == [upright((103, 201))]
    assert (image.height, image.width) == upright(size)
    assert whole_size(image) == (upright((103, 201)), factor)
    whole = read_image(path)  # nobody asks any more
    assert whole_size(whole) == (upright((103, 201)), 1)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_pixel_is_about_the_mean_of_those_it_stands_for(tmp_path: Path, factor: int) -> None:
    path = _photograph(tmp_path / "1.jpg", 104, 208)
    with asking(lambda size: factor):
        reduced = np.asarray(read_image(path), dtype=float)
    assert np.abs(reduced - np.asarray(read_image(path).reduce(factor))).mean() < 1


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    with asking(lambda size: 4):
        image = read_image(str(tmp_path / "1.png"))
    assert whole_size(image) == ((48, 64), 1)


def test_who_fails_asks_no_more(tmp_path: Path) -> None:
    path = _photograph(tmp_path / "1.jpg", 32, 32)
    with pytest.raises(RuntimeError), asking(lambda size: 2):
        raise RuntimeError
    assert read_image(path).size == (32, 32)


@pytest.mark.parametrize(
    "boxes, expected",
    [
        ([(0, 0, 224, 224)], 1),
        ([(0, 0, 447, 900)], 1),
        ([(0, 0, 448, 900)], 2),
        ([(0, 0, 900, 448)], 2),
        ([(0, 0, 900, 900), (5, 5, 500, 500)], 2),
        ([(0, 0, 5000, 5000)], 8),
    ],
)
def test_no_crop_is_enlarged_for_it(boxes: list[tuple[int, int, int, int]], expected: int) -> None:
    assert largest_factor([CropRecipe(box, (224, 224)) for box in boxes]) == expected


def test_boxes_stay_inside_and_are_off_by_half_a_pixel_at_most() -> None:
    rng = np.random.default_rng(0)
    for factor, (rows, columns) in itertools.product((2, 4, 8), ((601, 803), (600, 800), (607, 801))):
        reduced = (-(-rows // factor), -(-columns // factor))
        for _ in range(200):
            height, width = int(rng.integers(100, rows + 1)), int(rng.integers(100, columns + 1))
            top, left = int(rng.integers(0, rows - height + 1)), int(rng.integers(0, columns - width + 1))
            box = scaled(CropRecipe((top, left, height, width), (8, 8)), factor, reduced).box
            assert min(box) >= 0
            assert box[0] + box[2] <= reduced[0]
            assert box[1] + box[3] <= reduced[1]
            edges = (box[0], box[1], box[0] + box[2], box[1] + box[3])
            wanted = (top / factor, left / factor, (top + height) / factor, (left + width) / factor)
            assert all(abs(edge - want) <= 0.5 for edge, want in zip(edges, wanted, strict=True))


@pytest.mark.parametrize("augmentation", ["MultiCrop", "SingleCrop"])
def test_the_stream_makes_nearly_the_same_crops_of_fewer_pixels(tmp_path: Path, augmentation: str) -> None:
    (tmp_path / "d").mkdir()
    for i in range(2):
        _photograph(tmp_path / "d" / f"{i}.jpg", 700, 900, orientation=(1, 6)[i])
    overrides = [
        *(f"DATASETS.TRAIN=folder:{tmp_path}/d", f"INPUT.AUGMENTATION={augmentation}", "DATALOADER.NUM_WORKERS=0"),
        *("INPUT.GLOBAL_CROPS.SIZE_PX=96", "INPUT.LOCAL_CROPS.SIZE_PX=32", "INPUT.LOCAL_CROPS.NUM=2"),
        *("SOLVER.IMS_PER_BATCH=2", "INPUT.SOLARIZE.PROBS=(0.0, 0.0, 0.0)"),
    ]
    whole, reduced = (
        build_train_loader(_cfg(*overrides, f"INPUT.REDUCED_DECODE={on}")).dataset for on in (False, True)
    )
    factors = []
    for position in range(6):
        _, image, _ = reduced._load(position)
        factors.append(whole_size(image)[1])
        assert whole_size(whole._load(position)[1])[1] == 1
        assert reduced.index_at(position) == whole.index_at(position)
        pairs = zip(reduced[position].global_crops, whole[position].global_crops, strict=True)
        assert max((a.int() - b.int()).abs().float().mean().item() for a, b in pairs) < 3
        again = zip(reduced[position].global_crops, reduced[position].global_crops, strict=True)
        assert all(torch.equal(a, b) for a, b in again)
    assert set(factors) <= {2, 4, 8}


@pytest.mark.parametrize("augmentation", [MultiCrop, SingleCrop])
def test_small_images_and_the_switch(augmentation: type[MultiCrop] | type[SingleCrop]) -> None:
    rng = np.random.default_rng
    assert augmentation(_cfg()).reduction((375, 500), rng(0)) == 1
    assert augmentation(_cfg()).reduction((3000, 4000), rng(0)) > 1
    assert augmentation(_cfg("INPUT.REDUCED_DECODE=False")).reduction((3000, 4000), rng(0)) == 1
