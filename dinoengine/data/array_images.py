"""Files with any number of channels and bits to arrays, for INPUT.FORMAT "channels": nothing is converted or rounded.

    .npy                [H, W], [H, W, C] or [C, H, W] of any whole numbers or floats
    TIFF                by Pillow, or by tifffile where it has more channels, more bits per colour or several pages than
                        Pillow holds: the first series, [H, W], [H, W, C] or [C, H, W], pages being channels
    PNG, 16 bit colour  by OpenCV; Pillow would keep the high bytes
    others              by Pillow, in their own mode; palettes become colours

An EXIF orientation is followed where Pillow reads the file. The axis of the channels of an array is the one that is as long
as their number, the last one first. Files with another number, with values that are not finite, or of true and false are
refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from dinoengine.data.decode import (
    MAX_IMAGE_PIXELS,
    decode_picture,
    require_size,
    use_bytes,
    use_file,
)

_NPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Places in a PNG header: size, bits of a sample with the colour type behind them. 2, 4, 6: RGB, grey with alpha, RGBA.
_PNG_SIZE = (16, 20)
_PNG_DEPTH, _PNG_DEEP_COLOURS = 24, (b"\x10\2", b"\x10\4", b"\x10\6")
_TIFF_SAMPLES_PER_PIXEL, _TIFF_BITS_PER_SAMPLE = 277, 258
# What numpy cannot hold, and the nearest mode that it can.
_ARRAY_MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "YCbCr": "RGB", "HSV": "RGB"}


def read_channels(path: str, num_channels: int, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """The values in a file, as they are stored.

    Args:
        max_pixels: images of more (width x height) are refused by their header, before anything is decoded.

    Returns:
        [H, W, num_channels] of the type in the file.

    Raises:
        UnreadableImageError: if there is no such file, it is damaged, too large or of a kind that is not read, or holds
            another number of channels.
        ModuleNotFoundError: if this kind needs a package that is not installed; says which.
        MemoryError, OSError: if this process ran out of memory or file descriptors, which is no fault of the file.
    """
    return use_file(path, lambda file: _decode(file, num_channels, max_pixels))


def read_channels_bytes(data: bytes, where: str, num_channels: int, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """The values that the bytes of a file are; see ``read_channels``.

    Args:
        where: the bytes come from, for messages.
    """
    return use_bytes(data, where, lambda file: _decode(file, num_channels, max_pixels))


def picture_array(picture: Any) -> np.ndarray:
    """A ``PIL.Image`` as [H, W, C] with all its bits; palettes become colours, one bit 0 and 255."""
    mode = "RGBA" if picture.mode == "P" and "transparency" in picture.info else _ARRAY_MODES.get(picture.mode)
    array = np.asarray(picture if mode is None else picture.convert(mode))
    return array[..., None] if array.ndim == 2 else array


def require_image(array: np.ndarray, num_channels: int) -> np.ndarray:
    """An array [H, W, num_channels]; [H, W] is one channel.

    Raises:
        ValueError: if it has another number of channels or axes, no numbers, or values that are not finite.
    """
    image = array[..., None] if array.ndim == 2 else array
    if image.ndim != 3 or image.shape[2] != num_channels or 0 in image.shape:
        raise ValueError(
            f"it holds an array of shape {tuple(array.shape)}, and INPUT.FORMAT channels needs {num_channels} channel(s), "
            "as many as MODEL.PIXEL_MEAN has values"
        )
    if image.dtype.kind not in "uif":
        raise ValueError(f"its values are of type {image.dtype}; whole numbers or floats are needed")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError("it has values that are not finite")
    return image


def _channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """What a file holds that does not say which axis has the channels, as [H, W, C] where that can be."""
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] != num_channels and array.shape[0] == num_channels:
        return array.transpose(1, 2, 0)
    return array


def _decode(file: IO[bytes], num_channels: int, max_pixels: int) -> np.ndarray:
    start = file.read(_PNG_DEPTH + 2)
    file.seek(0)
    if start.startswith(_NPY_MAGIC):
        array = _channels_last(_read_npy(file, num_channels, max_pixels), num_channels)
    elif start.startswith(_TIFF_MAGIC):
        array = _read_tiff(file, num_channels, max_pixels)
    elif start.startswith(_PNG_MAGIC) and start[_PNG_DEPTH:] in _PNG_DEEP_COLOURS:
        array = _read_deep_png(file, max_pixels)
    else:
        array = picture_array(decode_picture(file, max_pixels))
    return require_image(array, num_channels)


def _read_npy(file: IO[bytes], num_channels: int, max_pixels: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"an .npy file of version {version}; numbers are saved in version 1 or 2")
    shape, _, dtype = read_header[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    _require_values(shape, num_channels, max_pixels)
    file.seek(0)
    array: np.ndarray = np.load(file, allow_pickle=False)
    return array


def _read_tiff(file: IO[bytes], num_channels: int, max_pixels: int) -> np.ndarray:
    if _pillow_holds_all_of_it(file):
        return picture_array(decode_picture(file, max_pixels))
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TIFF files with other than 1, 3 or 4 channels, with colours of more than 8 bits or with several pages are "
            "read by tifffile, which is not installed: pip install 'dinoengine[tiff]'."
        ) from error
    file.seek(0)
    with tifffile.TiffFile(file, name="image") as tiff:
        series = tiff.series[0]
        _require_values(series.shape, num_channels, max_pixels)
        # Each worker of a loader has one image at a time.
        return _channels_last(series.asarray(maxworkers=1), num_channels)


def _pillow_holds_all_of_it(file: IO[bytes]) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        picture: Any = Image.open(file, formats=("TIFF",))
    except UnidentifiedImageError:
        return False
    num_samples = picture.tag_v2.get(_TIFF_SAMPLES_PER_PIXEL, 1)
    bits = max(picture.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,)))
    all_bits = bits <= 8 or (num_samples == 1 and bits <= 32)
    holds = bool(picture.n_frames == 1 and num_samples == len(picture.getbands()) and all_bits)
    file.seek(0)
    return holds


def _read_deep_png(file: IO[bytes], max_pixels: int) -> np.ndarray:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PNG files with colours of 16 bits are read by OpenCV, which is not installed: pip install 'dinoengine[fast]'."
        ) from error
    data = file.read()
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in _PNG_SIZE)
    require_size(width, height, max_pixels)
    array = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise ValueError("OpenCV cannot decode it")
    order = cv2.COLOR_BGRA2RGBA if array.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(array, order)


def _require_values(shape: Sequence[int], num_channels: int, max_pixels: int) -> None:
    num_values = math.prod(shape)
    if num_values > max_pixels * num_channels:
        raise ValueError(
            f"an array of shape {tuple(shape)} has {num_values:,} values, more than DATALOADER.MAX_IMAGE_PIXELS "
            f"{max_pixels} for each of {num_channels} channel(s)"
        )
