"""What one image of a dataset is like: readable or not, size, mode, hashes, colours, and how long it took to decode."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from dinoengine.data.dataset import ImageDataset
from dinoengine.data.decode import UnreadableImageError, is_machine_fault, to_format
from dinoengine.data.perceptual_hash import perceptual_hash

# Standard deviation of the grey levels, 0..255, below which an image shows nothing: hashes of such images are noise.
BLANK_STD = 2.0

EMPTY, TRUNCATED, TOO_LARGE, NO_IMAGE, OTHER = "empty", "truncated", "too large", "no image", "other"
# The kinds of bad images, by what the message of ``decode`` or Pillow says; the first that fits.
_KINDS = (
    ("the file is empty", EMPTY),
    ("decompression bomb", TOO_LARGE),
    ("MAX_IMAGE_PIXELS", TOO_LARGE),
    ("truncated", TRUNCATED),
    ("Truncated", TRUNCATED),
    ("broken data stream", TRUNCATED),
    ("broken PNG", TRUNCATED),
    ("unexpected end", TRUNCATED),
    ("not one of", NO_IMAGE),
)


class Inspection(NamedTuple):
    """Of one image.

    Attributes:
        cause: why it cannot be used; empty for a good one, and then the following hold.
        width, height: in pixels, upright.
        mode: of Pillow, before it is converted.
        num_bytes: of its file; 0 where it has none of its own.
        content: 16 bytes, the same for the same pixels in the same mode, whatever file they are in.
        look: ``perceptual_hash``.
        is_blank: whether all pixels have nearly the same grey.
        mean, square: [3] of the values and squared values of red, green and blue in units of 0..1.
        seconds: to read and decode it.
    """

    cause: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    num_bytes: int = 0
    content: bytes = bytes(16)
    look: int = 0
    is_blank: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    square: tuple[float, ...] = (0.0, 0.0, 0.0)
    seconds: float = 0.0


class Inspections(Dataset[Inspection]):
    """index -> ``Inspection``, for the workers of a DataLoader."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Inspection:
        """
        Raises:
            MemoryError, OSError: if this process ran out of memory or file descriptors.
        """
        start = time.perf_counter()
        try:
            image = self.dataset.load(index)
            seconds = time.perf_counter() - start
            return _inspect(image)._replace(num_bytes=_size_of(self.dataset.path(index)), seconds=seconds)
        except Exception as error:  # a damaged file, or one of a mode that is refused
            if is_machine_fault(error):
                raise
            cause = error.cause if isinstance(error, UnreadableImageError) else f"{type(error).__name__}: {error}"
            return Inspection(cause=cause, num_bytes=_size_of(self.dataset.path(index)))


def kind_of(cause: str) -> str:
    """EMPTY, TRUNCATED, TOO_LARGE, NO_IMAGE or OTHER, by the cause that an inspection gives."""
    return next((kind for text, kind in _KINDS if text in cause), OTHER)


def _inspect(image: Any) -> Inspection:
    rgb = to_format(image, "RGB")
    counts = np.array(rgb.histogram(), dtype=np.float64).reshape(3, 256)
    levels = np.arange(256) / 255
    num_pixels = image.width * image.height
    mean, square = counts @ levels / num_pixels, counts @ levels**2 / num_pixels
    grey = rgb.convert("L")
    spread = np.array(grey.histogram(), dtype=np.float64)
    grey_mean = spread @ levels / num_pixels
    grey_std = np.sqrt(max(0.0, spread @ levels**2 / num_pixels - grey_mean**2)) * 255
    digest = hashlib.blake2b(f"{image.mode} {image.width} {image.height} ".encode(), digest_size=16)
    digest.update(image.tobytes())
    if image.palette is not None:  # the pixels are places in it
        digest.update(image.palette.tobytes())
    return Inspection(
        width=image.width,
        height=image.height,
        mode=image.mode,
        content=digest.digest(),
        look=perceptual_hash(grey),
        is_blank=bool(grey_std < BLANK_STD),
        mean=tuple(mean.tolist()),
        square=tuple(square.tolist()),
    )


def _size_of(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path is not None else 0
    except OSError:
        return 0
