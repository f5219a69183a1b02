"""Files of every kind against the pixels they must give, and files that must be refused, quickly and by name."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.config import get_cfg
from dinoengine.config.validate import _RANGES
from dinoengine.data import UnreadableImageError
from dinoengine.data.decode import MAX_IMAGE_PIXELS, read_image, read_size, to_format

GREY = np.array([[0, 1, 127], [128, 254, 255]], dtype=np.uint8)  # 2 rows, 3 columns
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def _saved(folder: Path, image: Image.Image, name: str = "1.png", **options: Any) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def _pixels(path: str, image_format: str = "RGB") -> list[Any]:
    return np.asarray(to_format(read_image(path), image_format)).tolist()


def _luma(rgb: np.ndarray) -> np.ndarray:
    """Rec. 601 in 16-bit fixed point, as Pillow documents it."""
    weights = np.array([19595, 38470, 7471])
    return ((rgb.astype(np.int64) @ weights + 0x8000) >> 16).astype(np.uint8)


def _png(colour_type: int, depth: int, rows: list[bytes], size: tuple[int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, so that the expectation does not come from the library that reads it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _written(folder: Path, data: bytes, name: str = "1.png") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


# ---- what each kind becomes


def test_grey_and_colour_are_as_they_are(tmp_path: Path):
    grey, colour = _saved(tmp_path, Image.fromarray(GREY)), _saved(tmp_path, Image.fromarray(COLOUR), "2.png")
    assert _pixels(grey, "L") == GREY.tolist()
    assert _pixels(grey) == np.stack([GREY] * 3, -1).tolist()
    assert _pixels(colour) == COLOUR.tolist()
    assert _pixels(colour, "L") == _luma(COLOUR).tolist()


def test_one_bit_is_black_and_white(tmp_path: Path):
    path = _written(tmp_path, _png(0, 1, [bytes([0b10100000])], (3, 1)))
    assert _pixels(path, "L") == [[255, 0, 255]]
    assert _pixels(path)[0][0] == [255, 255, 255]


def test_a_palette_gives_its_colours_and_a_transparent_entry_black(tmp_path: Path):
    palette = (b"PLTE", bytes([200, 100, 50, 10, 20, 30]))
    assert _pixels(_written(tmp_path, _png(3, 8, [b"\0\1"], (2, 1), palette))) == [[[200, 100, 50], [10, 20, 30]]]
    transparent = _png(3, 8, [b"\0\1"], (2, 1), palette, (b"tRNS", bytes([0])))
    assert _pixels(_written(tmp_path, transparent)) == [[[0, 0, 0], [10, 20, 30]]]


def test_alpha_is_laid_on_black(tmp_path: Path):
    rgba = bytes([200, 100, 50, 0, 200, 100, 50, 255, 200, 100, 50, 51])  # the last: a fifth
    assert _pixels(_written(tmp_path, _png(6, 8, [rgba], (3, 1)))) == [[[0, 0, 0], [200, 100, 50], [40, 20, 10]]]
    grey_alpha = bytes([200, 0, 200, 255, 200, 51])
    assert _pixels(_written(tmp_path, _png(4, 8, [grey_alpha], (3, 1))), "L") == [[0, 200, 40]]


def test_a_transparent_colour_is_laid_on_black(tmp_path: Path):
    rgb = bytes([9, 8, 7, 6, 5, 4])
    data = _png(2, 8, [rgb], (2, 1), (b"tRNS", struct.pack(">HHH", 9, 8, 7)))
    assert _pixels(_written(tmp_path, data)) == [[[0, 0, 0], [6, 5, 4]]]


def test_16_bits_become_their_high_byte_in_grey_as_in_colour(tmp_path: Path):
    values = (0, 255, 256, 32767, 32768, 65535)
    expected = [v >> 8 for v in values]
    grey = _written(tmp_path, _png(0, 16, [struct.pack(">6H", *values)], (6, 1)))
    assert _pixels(grey, "L") == [expected]
    colour = _written(tmp_path, _png(2, 16, [struct.pack(">6H", *values)], (2, 1)))
    assert _pixels(colour) == [[expected[:3], expected[3:]]]
    tiff = _saved(tmp_path, Image.fromarray(np.array([values], dtype=np.uint16)), "1.tif")
    assert _pixels(tiff, "L") == [expected]


def test_32_bit_integers_are_taken_as_16_bit_and_cut_outside(tmp_path: Path):
    path = _saved(tmp_path, Image.fromarray(np.array([[-5, 0, 32768, 65535, 70000]], dtype=np.int32)), "1.tif")
    assert read_image(path).mode == "I"
    assert _pixels(path, "L") == [[0, 0, 128, 255, 255]]


def test_a_float_image_is_refused(tmp_path: Path):
    """Values 0..1 and 0..255 are both usual; the wrong guess would give black images and say nothing."""
    path = _saved(tmp_path, Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "1.tif")
    with pytest.raises(UnreadableImageError, match=r"1\.tif is not a readable image \(a float image has no range"):
        read_image(path)
    with pytest.raises(ValueError, match="mode F cannot be used: a float image has no range"):
        to_format(Image.new("F", (1, 1)), "L")


def test_cmyk(tmp_path: Path):
    path = _saved(tmp_path, Image.new("CMYK", (2, 1), (255, 0, 0, 0)), "1.tif")
    assert _pixels(path) == [[[0, 255, 255]] * 2]
    black = _saved(tmp_path, Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "1.jpg", quality=100)
    assert max(max(max(pixel) for pixel in row) for row in _pixels(black)) <= 2


@pytest.mark.parametrize("name, options", [("1.gif", {}), ("1.webp", {"lossless": True}), ("1.png", {}), ("1.tif", {})])
def test_the_first_frame_counts(tmp_path: Path, name: str, options: dict[str, Any]):
    frames = [Image.new("RGB", (2, 1), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    path = _saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert _pixels(path) == [[[255, 0, 0]] * 2]


# Where the corner that is stored first, and its neighbour in the stored row, are shown; EXIF 2.32, table 6.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("name", ["1.png", "1.tif", "1.webp", "1.jpg"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation_is_undone_and_the_size_agrees(tmp_path: Path, name: str, orientation: int):
    image = Image.fromarray(np.kron(GREY, np.ones((16, 16), dtype=np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(tmp_path, image, name, exif=exif, quality=100, **({"lossless": True} if name == "1.webp" else {}))
    shown = np.array(_pixels(path, "L"))
    assert np.abs(shown[8::16, 8::16] - SHOWN[orientation](GREY.astype(int))).max() <= (2 if name == "1.jpg" else 0)
    assert read_size(path) == shown.shape[::-1]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_a_damaged_exif_block_leaves_the_image(tmp_path: Path, exif: bytes):
    path = _saved(tmp_path, Image.fromarray(np.full((8, 8), 100, dtype=np.uint8)), "1.jpg", exif=exif)
    assert np.abs(np.array(_pixels(path, "L")) - 100).max() <= 1


@pytest.mark.parametrize("value", [0, 9, 1000])
def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path, value: int):
    exif = Image.Exif()
    exif[0x0112] = value
    path = _saved(tmp_path, Image.fromarray(GREY), exif=exif)
    assert _pixels(path, "L") == GREY.tolist()


def test_the_content_decides_not_the_name(tmp_path: Path):
    path = str(tmp_path / "1.jpg")
    Image.fromarray(GREY).save(path, "PNG")
    assert _pixels(path, "L") == GREY.tolist()


# ---- what is refused

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("not an image"), "not one of JPEG, "),
    "missing": (lambda p: None, "No such file"),
    "folder": (lambda p: p.mkdir(), "not a regular file"),
    "named pipe": (lambda p: os.mkfifo(p), "not a regular file"),
    "dangling link": (lambda p: p.symlink_to("gone"), "No such file"),
    "link to itself": (lambda p: p.symlink_to(p), "symbolic links"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
    # Pillow would start Ghostscript for it.
    "postscript": (lambda p: Image.new("RGB", (4, 4)).save(p, "EPS"), "not one of JPEG, "),
    "icon": (lambda p: Image.new("RGB", (16, 16)).save(p, "ICO"), "not one of JPEG, "),
    "LAB": (lambda p: Image.new("LAB", (4, 4)).save(p, "TIFF"), "LAB; save it as RGB"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, kind: str):
    path = tmp_path / "1.jpg"
    make, cause = BROKEN[kind]
    make(path)
    for read in (read_image, read_size) if kind != "LAB" else (read_image,):
        with pytest.raises(UnreadableImageError, match=f"1.jpg is not a readable image .*{cause}") as caught:
            read(str(path))
        assert caught.value.path == str(path)
        assert str(path) not in caught.value.cause


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _saved(tmp_path, Image.fromarray(GREY))
    os.chmod(path, 0)
    if os.geteuid() == 0:  # root may read all; what others get

        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnreadableImageError, match=r"\(Permission denied\)"):
        read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = tmp_path / "1.jpg"
    Image.fromarray(noise).save(path, kind)
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: max(1, int(len(whole) * share))])
        with pytest.raises(UnreadableImageError, match=r"1\.jpg"):
            read_image(str(path))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds in damaged files
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, kind: str):
    """Nothing but an image or UnreadableImageError, whatever Pillow makes of the bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(buffer, kind)
    dice, path, outcomes = random.Random(kind), tmp_path / "1.img", set()
    for _ in range(150):
        data = bytearray(buffer.getvalue())
        for _ in range(dice.randint(1, 10)):
            data[dice.randrange(min(len(data), 200))] = dice.randrange(256)
        path.write_bytes(data)
        try:
            image = read_image(str(path), max_pixels=10_000)
        except UnreadableImageError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert image.width * image.height <= 10_000
            assert to_format(image, "RGB").mode == "RGB"
    assert outcomes == {"read", "refused"}


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import ImageFile

    path = _saved(tmp_path, Image.new("1", (400, 300)))
    decoded: list[object] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (decoded.append(self), load(self))[1])
    assert read_image(path, max_pixels=120_000).size == (400, 300)
    assert len(decoded) == 1
    with pytest.raises(
        UnreadableImageError, match=r"400 x 300 pixels, and DATALOADER.MAX_IMAGE_PIXELS is 119999: a dec"
    ):
        read_image(path, max_pixels=119_999)
    assert len(decoded) == 1


def test_a_header_that_asks_for_gigabytes_is_refused(tmp_path: Path):
    path = _written(tmp_path, _png(6, 8, [b""], (60_000, 60_000)))
    with pytest.raises(
        UnreadableImageError, match=r"more pixels .* DATALOADER\.MAX_IMAGE_PIXELS may be: a decompression bomb"
    ):
        read_image(path)


def test_the_limit_of_the_config_is_pillows_own():
    assert MAX_IMAGE_PIXELS == 2 * Image.MAX_IMAGE_PIXELS == get_cfg().DATALOADER.MAX_IMAGE_PIXELS  # type: ignore[operator]
    assert _RANGES["DATALOADER.MAX_IMAGE_PIXELS"][1] == MAX_IMAGE_PIXELS


@pytest.mark.parametrize("fault", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=repr)
def test_a_fault_of_the_machine_is_not_one_of_the_image(
    tmp_path: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch
):
    """A run that replaced images because memory is short would not be the run that had enough."""
    path = _saved(tmp_path, Image.fromarray(GREY))

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(fault)) as caught:
        read_image(path)
    assert not isinstance(caught.value, UnreadableImageError)


def test_the_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableImageError("/a/1.jpg", "the file is empty")))
    assert (error.path, error.cause) == ("/a/1.jpg", "the file is empty")
    assert str(error) == "/a/1.jpg is not a readable image (the file is empty). Remove or repair the file."


def test_no_descriptor_is_left_open(tmp_path: Path):
    good, bad = _saved(tmp_path, Image.fromarray(GREY)), _written(tmp_path, b"no image", "2.png")
    read_image(good)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_image(good)
        with pytest.raises(UnreadableImageError):
            read_image(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_with_control_bytes_is_shown_escaped_and_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J\nerror: no.png"
    path.write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"a\\x1b\[2J\\nerror: no\.png is not a readable image") as failed:
        read_image(str(path))
    assert failed.value.path == str(path)


def test_an_array_is_told_what_reads_it(tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(UnreadableImageError, match=r"1\.npy is not .*; arrays need INPUT\.FORMAT channels"):
        read_image(str(tmp_path / "1.npy"))
