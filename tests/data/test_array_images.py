"""Files with many channels and bits against the values that were written."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import UnreadableImageError
from dinoengine.data.array_images import picture_array, read_channels, read_channels_bytes
from dinoengine.data.decode import is_machine_fault

DEEP = np.random.default_rng(0).integers(0, 65536, (6, 7, 5), dtype=np.uint16)


def _npy(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "uint16", "int32", "float16", "float64"])
def test_an_npy_file_gives_the_numbers_that_were_saved(dtype: str, tmp_path: Path) -> None:
    values = (DEEP % 200).astype(dtype)
    found = read_channels(_npy(tmp_path / "a.npy", values), 5)
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, values)


@pytest.mark.parametrize("array", [DEEP, DEEP.transpose(2, 0, 1), DEEP[None, None], DEEP.transpose(2, 0, 1)[None]])
def test_the_axis_of_the_channels_is_found(array: np.ndarray, tmp_path: Path) -> None:
    assert np.array_equal(read_channels(_npy(tmp_path / "a.npy", array), 5), DEEP)


def test_the_last_axis_comes_first_and_two_axes_are_one_channel(tmp_path: Path) -> None:
    assert read_channels(_npy(tmp_path / "a.npy", np.zeros((5, 4, 5))), 5).shape == (5, 4, 5)
    assert np.array_equal(read_channels(_npy(tmp_path / "b.npy", DEEP[..., 0]), 1), DEEP[..., :1])


def test_the_rows_of_a_picture_are_never_its_channels(tmp_path: Path) -> None:
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=r"shape \(5, 7, 3\), .* needs 5 channel"):
        read_channels(str(tmp_path / "a.png"), 5)


@pytest.mark.parametrize(
    "array, message",
    [
        (DEEP, r"array of shape \(6, 7, 5\), and INPUT.FORMAT channels needs 3 channel\(s\)"),
        (DEEP[..., 0], r"shape \(6, 7\), .* needs 3"),
        (np.zeros((2, 3, 4, 3)), r"shape \(2, 3, 4, 3\)"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        (np.zeros((2, 2, 3), dtype=bool), "values are of type bool"),
        (np.zeros((2, 2, 3), dtype=complex), "values are of type complex"),
        (np.full((2, 2, 3), np.nan), "not finite"),
        (np.full((2, 2, 3), -np.inf, dtype=np.float16), "not finite"),
    ],
)
def test_what_is_no_image_of_three_channels(array: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=message) as caught:
        read_channels(_npy(tmp_path / "a.npy", array), 3)
    assert caught.value.path == str(tmp_path / "a.npy")


def test_arrays_are_refused_by_their_header(tmp_path: Path) -> None:
    # The header asks for 32 GB; nothing of them is there.
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (2**17, 2**17)})
    (tmp_path / "bomb.npy").write_bytes(file.getvalue())
    with pytest.raises(UnreadableImageError, match=r"17,179,869,184 values, more than DATALOADER.MAX_IMAGE_PIXELS"):
        read_channels(str(tmp_path / "bomb.npy"), 1)
    read_channels(_npy(tmp_path / "a.npy", DEEP), 5, max_pixels=42)
    with pytest.raises(UnreadableImageError, match="MAX_IMAGE_PIXELS 41 for each of 5"):
        read_channels(str(tmp_path / "a.npy"), 5, max_pixels=41)


def test_objects_are_never_loaded_and_half_a_file_is_no_file(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImageError, match="Python objects, which are never loaded"):
        read_channels(str(tmp_path / "o.npy"), 1)
    whole = Path(_npy(tmp_path / "a.npy", DEEP)).read_bytes()
    for length in (0, 4, 9, len(whole) // 2, len(whole) - 1):
        with pytest.raises(UnreadableImageError):
            read_channels_bytes(whole[:length], "part", 5)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_keeps_every_level(name: str, tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / name)
    assert np.array_equal(read_channels(str(tmp_path / name), 1)[..., 0], levels)


def test_a_float_tiff_is_read_as_it_has_a_range_here(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.array_equal(read_channels(str(tmp_path / "a.tif"), 1)[..., 0], values)


def test_pictures_of_8_bits_are_as_they_are_stored(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    for name, channels in (("a.png", 4), ("b.tif", 4), ("c.bmp", 3), ("d.tif", 3)):
        Image.fromarray(pixels[..., :channels]).save(tmp_path / name)
        assert np.array_equal(read_channels(str(tmp_path / name), channels), pixels[..., :channels])
    one_bit = Image.new("1", (2, 1), 1)
    assert picture_array(one_bit).tolist() == [[[255], [255]]]
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert picture_array(palette).tolist() == [[[200, 100, 50]]]


def _png_16(colour_type: int, values: np.ndarray) -> bytes:
    """Written by hand, so that the expectation does not come from a library that reads it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = values.shape[:2]
    header = struct.pack(">IIBBBBB", columns, rows, 16, colour_type, 0, 0, 0)
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour_type, channels", [(2, 3), (6, 4)])
def test_16_bit_colours_of_a_png_keep_their_low_byte(colour_type: int, channels: int) -> None:
    pytest.importorskip("cv2")
    data = _png_16(colour_type, DEEP[..., :channels])
    assert np.array_equal(read_channels_bytes(data, "deep.png", channels), DEEP[..., :channels])
    with pytest.raises(UnreadableImageError, match="7 x 6 pixels, and DATALOADER.MAX_IMAGE_PIXELS is 41"):
        read_channels_bytes(data, "deep.png", channels, max_pixels=41)
    with pytest.raises(UnreadableImageError, match="OpenCV cannot decode"):
        read_channels_bytes(data[:40], "deep.png", channels)


@pytest.mark.parametrize("planar", ["separate", "contig"])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_tiffs_that_pillow_cannot_hold(planar: str, photometric: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = DEEP if photometric == "minisblack" else DEEP[..., :3]
    stored = values.transpose(2, 0, 1) if planar == "separate" else values
    tifffile.imwrite(tmp_path / "a.tif", np.ascontiguousarray(stored), planarconfig=planar, photometric=photometric)
    assert np.array_equal(read_channels(str(tmp_path / "a.tif"), values.shape[2]), values)


def test_pages_of_a_tiff_are_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", DEEP.transpose(2, 0, 1), photometric="minisblack")  # a page each
    tifffile.imwrite(tmp_path / "b.tif", DEEP.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"})
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(read_channels(str(tmp_path / name), 5), DEEP)
    with pytest.raises(UnreadableImageError, match="needs 4 channel"):
        read_channels(str(tmp_path / "a.tif"), 4)
    with pytest.raises(UnreadableImageError, match="MAX_IMAGE_PIXELS 41 for each of 5"):
        read_channels(str(tmp_path / "a.tif"), 5, max_pixels=41)


def test_a_missing_package_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every such file would count as a bad image and be replaced."""
    pages = [Image.fromarray(DEEP[..., i]) for i in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ModuleNotFoundError, match=r"read by tifffile, .*dinoengine\[tiff\]") as caught:
        read_channels(str(tmp_path / "a.tif"), 5)
    assert is_machine_fault(caught.value)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"by OpenCV, .*dinoengine\[fast\]"):
        read_channels_bytes(_png_16(2, DEEP[..., :3]), "deep.png", 3)
