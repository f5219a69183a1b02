"""What one image of a dataset is like: readable or not, size, mode, hashes, colours, and how long it took to decode."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dinoengine.data.array_images import picture_array
from dinoengine.data.channels import Channels, in_format
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.decode import UnreadableImageError, is_machine_fault, to_format
from dinoengine.data.perceptual_hash import perceptual_hash

# Standard deviation of the grey levels, 0..255, below which an image shows nothing: hashes of such images are noise.
BLANK_STD = 2.0

EMPTY, TRUNCATED, TOO_LARGE, NO_IMAGE, OTHER = "empty", "truncated", "too large", "no image", "other"
NOT_FINITE, OTHER_CHANNELS = "not finite", "other channels"
# Images of these numbers of channels can be looked at, by eyes and by a perceptual hash.
SHOWN_CHANNELS = (1, 3)
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
    ("not finite", NOT_FINITE),
    ("INPUT.FORMAT channels needs", OTHER_CHANNELS),
)


class Inspection(NamedTuple):
    """Of one image.

    Attributes:
        cause: why it cannot be used; empty for a good one, and then the following hold.
        width, height: in pixels, upright.
        mode: of Pillow, before it is converted; of arrays their type and number of channels.
        num_bytes: of its file; 0 where it has none of its own.
        content: 16 bytes, the same for the same pixels in the same mode, whatever file they are in.
        look: ``perceptual_hash``; without meaning if not ``has_look``: of images that show nothing, and of arrays with
            other than SHOWN_CHANNELS.
        is_blank: whether all pixels have nearly the same grey.
        mean, square: [C] of the values and squared values of red, green and blue, or of each channel, in units of 0..1.
        seconds: to read and decode it.
    """

    cause: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    num_bytes: int = 0
    content: bytes = bytes(16)
    look: int = 0
    has_look: bool = False
    is_blank: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    square: tuple[float, ...] = (0.0, 0.0, 0.0)
    seconds: float = 0.0


class Inspections(Dataset[Inspection]):
    """index -> ``Inspection``, for the workers of a DataLoader."""

    def __init__(self, dataset: ImageDataset, channels: Channels | None = None) -> None:
        """
        Args:
            channels: what the images are for INPUT.FORMAT "channels", and the dataset loads arrays; None: pictures.
        """
        self.dataset = dataset
        self.channels = channels

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
            found = _inspect(image) if self.channels is None else _inspect_channels(image, self.channels)
            return found._replace(num_bytes=_size_of(self.dataset.path(index)), seconds=seconds)
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
        has_look=bool(grey_std >= BLANK_STD),
        is_blank=bool(grey_std < BLANK_STD),
        mean=tuple(mean.tolist()),
        square=tuple(square.tolist()),
    )


def picture_of(image: Any, channels: Channels) -> Any:
    """A ``PIL.Image`` of an array of SHOWN_CHANNELS, its own lowest and highest value black and white."""
    from PIL import Image

    values = in_format(image, channels)
    low, high = values.min(), values.max()
    pixels = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if channels.count == 1 else pixels)


def _inspect_channels(image: Any, channels: Channels) -> Inspection:
    stored = image if isinstance(image, np.ndarray) else picture_array(image)
    values = in_format(stored, channels)
    spread = float(values.mean(0, dtype=torch.float64).std(correction=0)) * 255
    is_shown = channels.count in SHOWN_CHANNELS and spread >= BLANK_STD
    digest = hashlib.blake2b(f"{stored.dtype} {stored.shape} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(stored).data)
    return Inspection(
        width=values.shape[2],
        height=values.shape[1],
        mode=f"{stored.dtype}, {channels.count} channel(s)",
        content=digest.digest(),
        look=perceptual_hash(picture_of(stored, channels).convert("L")) if is_shown else 0,
        has_look=is_shown,
        is_blank=spread < BLANK_STD,
        mean=tuple(values.mean((1, 2), dtype=torch.float64).tolist()),
        square=tuple(values.double().square().mean((1, 2)).tolist()),
    )


def _size_of(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path is not None else 0
    except OSError:
        return 0
