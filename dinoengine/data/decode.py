"""Image files to pixels, in one place: what is read, what is refused, and what each kind of image becomes.

A file is decoded to a ``PIL.Image`` in its own mode (``read_image``) and converted to INPUT.FORMAT (``to_format``):

    8 bit grey, RGB            as they are; between the two by Pillow: L = (299 R + 587 G + 114 B) / 1000
    1 bit                      0 and 255
    palette                    its colours
    CMYK, YCbCr, HSV           Pillow's formula; colour profiles are ignored
    alpha, transparent colour  laid on black; with "RGBA" kept beside the colours as they are stored
    16 bit grey                its high byte, as Pillow reads 16 bit colours; Pillow's own conversion would cut at 255
    32 bit integer             as 16 bit grey, values outside 0..65535 cut (older Pillow reads 16 bit grey in this mode)
    float, LAB                 refused: a float has no range of its own
    EXIF orientation           turned upright; an EXIF block that cannot be read is ignored
    animation, several pages   the first

``array_images`` reads files for INPUT.FORMAT "channels", with all channels and bits.

A file name says nothing about the format: it is found from the content, among those of ``FORMATS``. What Pillow hands to
another program (PostScript to Ghostscript) is not among them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import numpy as np

from dinoengine.data.reduced_decode import reduce_before_loading
from dinoengine.utils.file_io import is_url, read_bytes
from dinoengine.utils.printable import printable

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Pillow's own bound, above which it refuses to open a file whatever we say.
MAX_IMAGE_PIXELS = 178_956_970

_REFUSED_MODES = {
    "F": "a float image has no range of its own; save it with 8 or 16 bits",
    "LAB": "the colours are LAB; save it as RGB",
}
# Of this process or machine, not of the file: another image would fail as well.
_MACHINE_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)

Result = TypeVar("Result")


class UnreadableImageError(OSError):
    """A file that cannot be used as an image.

    Attributes:
        path: of the file.
        cause: why, without the path.
    """

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{printable(path)} is not a readable image ({cause}). Remove or repair the file.")
        self.path = path
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.cause)


def read_image(path: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Any:
    """The image in a file, or behind a URL, as a ``PIL.Image`` in its own mode, upright.

    Args:
        max_pixels: images of more are refused by their header, before anything is decoded.

    Raises:
        UnreadableImageError: if there is no such file, or it is no regular file, not permitted, damaged, too large, or of
            a kind that is not read.
        MemoryError, OSError: if this process ran out of memory or file descriptors, which is no fault of the file.
    """
    return use_file(path, lambda file: _decode(file, max_pixels))


def read_image_bytes(data: bytes, where: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Any:
    """The image that the bytes of a file are; see ``read_image``.

    Args:
        where: the bytes come from, for messages: ``shard.tar/1.jpg``.
    """
    return use_bytes(data, where, lambda file: _decode(file, max_pixels))


def read_size(path: str) -> tuple[int, int]:
    """(width, height) of the image that ``read_image`` gives, from the header alone.

    Raises:
        UnreadableImageError: if it cannot be read; see ``read_image``.
    """
    return use_file(path, _upright_size)


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error tells of this process or machine and not of the image that was being loaded."""
    is_of_process = isinstance(error, (MemoryError, ModuleNotFoundError))
    return is_of_process or (isinstance(error, OSError) and error.errno in _MACHINE_FAULTS)


def to_format(image: Any, image_format: str) -> Any:
    """Convert a PIL image to "RGB", "L" or "RGBA", as the module's table says.

    Raises:
        ValueError: for a mode that is refused.
    """
    has_transparency = image_format != "RGBA" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info)
    if image.mode == image_format and not has_transparency:
        return image
    if refused := _REFUSED_MODES.get(image.mode):
        raise ValueError(f"An image of mode {image.mode} cannot be used: {refused}.")
    if image.mode.startswith("I;16") or image.mode == "I":
        from PIL import Image

        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif has_transparency:
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(image_format)


@contextlib.contextmanager
def _faults_of(where: str) -> Iterator[None]:
    """Any error of the block is one of this image, unless it is one of the machine: of a damaged file Pillow raises almost
    anything, and what a file system behind a URL raises is its own affair."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:
        if is_machine_fault(error):
            raise
        raise UnreadableImageError(where, _cause(error, where)) from error


def use_file(path: str, use: Callable[[IO[bytes]], Result]) -> Result:
    """``use`` of a file, opened for reading; of what is behind a URL, of its bytes.

    Raises:
        UnreadableImageError: if it cannot be opened or is empty, or ``use`` fails in any way that is the file's fault.
        MemoryError, OSError, ModuleNotFoundError: see ``is_machine_fault``.
    """
    if is_url(path):
        with _faults_of(path):
            data = read_bytes(path)
        return use_bytes(data, path, use)
    with _faults_of(path):
        # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImageError(path, "not a regular file")
            if not status.st_size:
                raise UnreadableImageError(path, "the file is empty")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return use(file)
        finally:
            os.close(descriptor)


def use_bytes(data: bytes, where: str, use: Callable[[IO[bytes]], Result]) -> Result:
    """``use`` of the bytes of a file; raises as ``use_file``."""
    with _faults_of(where):
        if not data:
            raise UnreadableImageError(where, "the file is empty")
        return use(io.BytesIO(data))


def _cause(error: Exception, where: str) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        is_array = where.lower().endswith(".npy")
        return f"not one of {', '.join(FORMATS)}" + ("; arrays need INPUT.FORMAT channels" if is_array else "")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        highest = f"{MAX_IMAGE_PIXELS}, the most that DATALOADER.MAX_IMAGE_PIXELS may be"
        return f"more pixels than {highest}: a decompression bomb"
    return str(error) or type(error).__name__


def require_size(width: int, height: int, max_pixels: int) -> None:
    """
    Raises:
        ValueError: for more than ``max_pixels``.
    """
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels, and DATALOADER.MAX_IMAGE_PIXELS is {max_pixels}: a decompression bomb, unless the "
            "key should be higher"
        )


def decode_picture(file: IO[bytes], max_pixels: int) -> Any:
    """The ``PIL.Image`` in an open file, in its own mode, upright; also in the modes that ``read_image`` refuses."""
    from PIL import Image

    image = Image.open(file, formats=FORMATS)
    require_size(*image.size, max_pixels)
    turn = _orientation(image)
    reduce_before_loading(image, turn in _SIDEWAYS)
    image.load()
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[turn]) if turn in turns else image


def _decode(file: IO[bytes], max_pixels: int) -> Any:
    image = decode_picture(file, max_pixels)
    if refused := _REFUSED_MODES.get(image.mode):
        raise ValueError(refused)
    return image


def _upright_size(file: IO[bytes]) -> tuple[int, int]:
    from PIL import Image

    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _orientation(image: Any) -> int:
    # A TIFF is turned by Pillow itself, and its size is that after it. A PNG may have the block behind its pixels, which is
    # rare, and would have to be decoded to learn its size: there it does not count.
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (
        Exception
    ):  # Pillow raises almost anything of a damaged EXIF block, which leaves the pixels as good as they are
        return 1
