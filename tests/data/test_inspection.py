"""One image: what is said of good ones, and that bad ones end in a cause and not in an error."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import ImageDataset, ImageFolder
from dinoengine.data.inspection import EMPTY, NO_IMAGE, OTHER, TOO_LARGE, TRUNCATED, Inspection, Inspections, kind_of


class _One(ImageDataset):
    """One image, or the error that loading it ends in."""

    def __init__(self, image: Any) -> None:
        self.image = image

    def __len__(self) -> int:
        return 1

    def load(self, index: int) -> Any:
        if isinstance(self.image, Exception):
            raise self.image
        return self.image


def _inspect(image: Any) -> Inspection:
    return Inspections(_One(image))[0]


def _noise(mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_a_good_image(mode: str) -> None:
    found = _inspect(_noise(mode))
    assert (found.cause, found.width, found.height, found.mode, found.num_bytes) == ("", 50, 30, mode, 0)
    pixels = np.asarray(_noise(mode).convert("RGB"), dtype=np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(found.square, (pixels**2).mean((0, 1)), atol=1e-12)
    assert found.seconds > 0
    assert not found.is_blank


def test_the_content_is_that_of_the_pixels_whatever_the_file(tmp_path: Path) -> None:
    image = _noise()
    image.save(tmp_path / "1.png")
    image.save(tmp_path / "2.bmp")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "3.png")
    image.resize((30, 50)).save(tmp_path / "4.png")
    found = [Inspections(ImageFolder(str(tmp_path)))[i] for i in range(4)]
    assert found[0].content == found[1].content
    assert len({one.content for one in found}) == 3
    assert [one.num_bytes for one in found] == [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert len(found[0].content) == 16


def test_the_shape_and_the_palette_belong_to_the_content() -> None:
    flat = [Image.new("L", size, 7) for size in ((4, 6), (6, 4), (2, 12))]
    assert len({_inspect(image).content for image in flat}) == 3
    one, other = Image.new("P", (4, 4)), Image.new("P", (4, 4))
    one.putpalette([255, 0, 0])
    other.putpalette([0, 0, 255])
    assert _inspect(one).content != _inspect(other).content


@pytest.mark.parametrize(("spread", "is_blank"), [(0, True), (1, True), (20, False)])
def test_blank_is_nearly_one_grey(spread: int, is_blank: bool) -> None:
    pixels = np.full((10, 10), 100, dtype=np.uint8)
    pixels[::2] += np.uint8(2 * spread)  # standard deviation: spread
    assert _inspect(Image.fromarray(pixels)).is_blank is is_blank


def test_damaged_files_have_a_cause_of_a_kind(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    _noise().save(whole)
    data = whole.read_bytes()
    (tmp_path / "a_cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "b_empty.jpg").touch()
    (tmp_path / "c_text.jpg").write_text("<html>not found</html>")
    _noise().save(tmp_path / "d.png")
    cut = (tmp_path / "d.png").read_bytes()
    (tmp_path / "d_cut.png").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "d.png").unlink()
    Image.new("F", (4, 4)).save(tmp_path / "e_float.tif")
    dataset = ImageFolder(str(tmp_path))
    dataset.limit_pixels(30 * 50 - 1)
    found = [Inspections(dataset)[i] for i in range(len(dataset))]
    assert [kind_of(one.cause) for one in found[:4]] == [TOO_LARGE, EMPTY, NO_IMAGE, TOO_LARGE]
    assert found[4].cause == "a float image has no range of its own; save it with 8 or 16 bits"
    dataset.limit_pixels(10**6)
    assert [kind_of(Inspections(dataset)[i].cause) for i in (0, 3)] == [TRUNCATED, TRUNCATED]
    assert found[1].num_bytes == 0
    assert found[2].num_bytes == 22
    assert not any(str(tmp_path) in one.cause for one in found)  # the name stands beside it
    assert math.isclose(sum(found[1].mean), 0)


def test_errors_of_a_dataset_are_causes_and_those_of_the_machine_are_errors() -> None:
    found = _inspect(RuntimeError("the archive is damaged"))
    assert found.cause == "RuntimeError: the archive is damaged"
    assert kind_of(found.cause) == OTHER
    for error in (MemoryError(), OSError(errno.EMFILE, "too many open files")):
        with pytest.raises(type(error)):
            _inspect(error)
