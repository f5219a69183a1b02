"""What a dataset is."""

from __future__ import annotations

import abc
import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinoengine.data.array_images import read_channels, read_channels_bytes
from dinoengine.data.decode import MAX_IMAGE_PIXELS, read_image, read_image_bytes
from dinoengine.data.fingerprint import fingerprint
from dinoengine.structures import Sample


class DataError(RuntimeError):
    """An image that cannot be used; says which one and why.

    A DataLoader wraps an error of a worker in text about the worker and its traceback; ``str`` gives our message alone.
    """

    def __str__(self) -> str:
        return super().__str__().rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


class ImageDataset(abc.ABC):
    """Images by index, with labels where there are any. Must be picklable (workers are processes).

    Attributes:
        class_names: name of each label 0..n-1; None without labels.
        multi_label_class_names: name of each class 0..n-1 where an image may show several; None otherwise. Such a dataset
            is multi-label: it has no ``class_names``.
        mask_class_names: name of each class 0..n-1 that a pixel may have; None without masks.
        max_image_pixels: files of more pixels are refused (``limit_pixels``).
        num_channels: of the arrays that files become (``load_channels``); 0: they become a ``PIL.Image``.
    """

    class_names: list[str] | None = None
    multi_label_class_names: list[str] | None = None
    mask_class_names: list[str] | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    num_channels: int = 0

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def load(self, index: int) -> Any:
        """The image at ``index`` as a ``PIL.Image`` in any mode, or, for INPUT.FORMAT "channels", an array [H, W, C].

        A dataset of files returns what ``read_file`` or ``read_bytes`` give.
        """

    def label(self, index: int) -> int | None:
        """The label at ``index``, without decoding the image; None when there is none."""
        return None

    def labels(self) -> np.ndarray:
        """All labels, [images] whole numbers. Override it where they are an array: this asks for one after the other.

        Raises:
            ValueError: for a dataset without labels.
        """
        if self.class_names is None:
            raise ValueError(f"{type(self).__name__} has no labels.")
        return np.fromiter((self.label(i) for i in range(len(self))), dtype=np.int64, count=len(self))

    def multi_label(self, index: int) -> np.ndarray | None:
        """Which classes the image at ``index`` shows, without decoding it.

        Returns:
            [K] int8 by ``multi_label_class_names``: 1 it shows the class, -1 it does not, 0 it does not count for this
            class; None for a dataset that is not multi-label.
        """
        return None

    def load_mask(self, index: int) -> np.ndarray | None:
        """The class of each pixel of the image at ``index``, ``structures.IGNORE`` where there is none.

        Returns:
            [H, W] uint8; None for a dataset without masks.
        """
        return None

    def path(self, index: int) -> str | None:
        """The file (or its URL) that holds the image at ``index`` and nothing else; None where there is no such file."""
        return None

    def source(self, index: int) -> int | None:
        """Which of several datasets that were put together the image at ``index`` is from; None for a single one."""
        return None

    def describe(self, index: int) -> str:
        """Where this image comes from, for messages: a path or ``digits[17]``."""
        return f"{type(self).__name__}[{index}]"

    def read_file(self, path: str) -> Any:
        """The image in a file, as the settings of this dataset say.

        Raises:
            UnreadableImageError: if it cannot be used; names the path.
        """
        if self.num_channels:
            return read_channels(path, self.num_channels, self.max_image_pixels)
        return read_image(path, self.max_image_pixels)

    def read_bytes(self, data: bytes, where: str) -> Any:
        """As ``read_file``, of the bytes of a file; ``where`` they come from, for messages."""
        if self.num_channels:
            return read_channels_bytes(data, where, self.num_channels, self.max_image_pixels)
        return read_image_bytes(data, where, self.max_image_pixels)

    def limit_pixels(self, max_image_pixels: int) -> None:
        """Refuse images of more pixels. A dataset made of others passes it on to them."""
        self.max_image_pixels = max_image_pixels

    def load_channels(self, num_channels: int) -> None:
        """Read files with all their channels and bits, as arrays (0: as pictures). Passed on like ``limit_pixels``."""
        self.num_channels = num_channels

    def fingerprint(self) -> str | None:
        """What a resumed run compares: the same for the same names of images in the same order with the same labels,
        wherever they lie and whatever their pixels are. None where nobody can tell. ``data.fingerprint`` makes it quick."""
        return None

    @property
    def index_files(self) -> list[str]:
        """Files in which an index of the images is kept; none where there is no index, or it is in memory alone."""
        return []

    @property
    def has_labels(self) -> bool:
        return self.class_names is not None

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):  # also what ends a for loop over a dataset
            raise IndexError(f"Index {index} is out of range: there are images 0..{len(self) - 1}.")
        return Sample(self.load(index), self.label(index))


class FileDataset(ImageDataset):
    """Images that are files: a subclass says their paths, and has their labels as an array if there are any.

    Attributes:
        file_labels: [images], the label of each file; None without labels.
    """

    file_labels: np.ndarray | None = None

    @abc.abstractmethod
    def path(self, index: int) -> str:
        """Absolute path or URL of the image at ``index``."""

    def load(self, index: int) -> Any:
        """Decode the file; see ``read_file``.

        Raises:
            UnreadableImageError: if it is no image or cannot be read; names the path.
        """
        return self.read_file(self.path(index))

    def label(self, index: int) -> int | None:
        return None if self.file_labels is None else int(self.file_labels[index])

    def labels(self) -> np.ndarray:
        return super().labels() if self.file_labels is None else self.file_labels

    def describe(self, index: int) -> str:
        return self.path(index)


class ConcatImageDataset(ImageDataset):
    """Several datasets one after the other. It has labels of one kind if all have the same class names of that kind."""

    def __init__(self, datasets: Sequence[ImageDataset]) -> None:
        self.datasets = list(datasets)
        self._ends = list(itertools.accumulate(len(d) for d in self.datasets))
        names = self.datasets[0].class_names
        self.class_names = names if all(d.class_names == names for d in self.datasets) else None
        names = self.datasets[0].multi_label_class_names
        self.multi_label_class_names = names if all(d.multi_label_class_names == names for d in self.datasets) else None
        names = self.datasets[0].mask_class_names
        self.mask_class_names = names if all(d.mask_class_names == names for d in self.datasets) else None

    def _locate(self, index: int) -> tuple[ImageDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is out of range: there are images 0..{len(self) - 1}.")
        which = bisect.bisect_right(self._ends, index)
        return self.datasets[which], index - (self._ends[which - 1] if which else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def load(self, index: int) -> Any:
        dataset, inner = self._locate(index)
        return dataset.load(inner)

    def label(self, index: int) -> int | None:
        dataset, inner = self._locate(index)
        return dataset.label(inner) if self.has_labels else None

    def labels(self) -> np.ndarray:
        return np.concatenate([dataset.labels() for dataset in self.datasets]) if self.has_labels else super().labels()

    def multi_label(self, index: int) -> np.ndarray | None:
        dataset, inner = self._locate(index)
        return dataset.multi_label(inner) if self.multi_label_class_names is not None else None

    def load_mask(self, index: int) -> np.ndarray | None:
        dataset, inner = self._locate(index)
        return dataset.load_mask(inner) if self.mask_class_names is not None else None

    def path(self, index: int) -> str | None:
        dataset, inner = self._locate(index)
        return dataset.path(inner)

    def source(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def describe(self, index: int) -> str:
        dataset, inner = self._locate(index)
        return dataset.describe(inner)

    def fingerprint(self) -> str | None:
        parts = [dataset.fingerprint() for dataset in self.datasets]
        return None if None in parts else fingerprint(*parts)

    def limit_pixels(self, max_image_pixels: int) -> None:
        for dataset in self.datasets:
            dataset.limit_pixels(max_image_pixels)

    def load_channels(self, num_channels: int) -> None:
        for dataset in self.datasets:
            dataset.load_channels(num_channels)


def require_labels(dataset: ImageDataset, num_classes: int, which: str) -> None:
    """See that a dataset can train a classifier with this many classes; ``which`` it is, for messages.

    Raises:
        ValueError: if it has no labels, sets of classes for labels, or another number of classes.
    """
    if dataset.multi_label_class_names is not None:
        raise ValueError(
            f"A classifier is trained with one class per image, and {which} is multi-label; the evaluator 'logreg' takes "
            "such sets."
        )
    if dataset.class_names is None:
        raise ValueError(
            f"A classifier is trained with labels, and {which} has none (several datasets have labels together only if "
            "they have the same classes). Give one with labels, e.g. a folder with one sub-folder per class."
        )
    if len(dataset.class_names) != num_classes:
        raise ValueError(
            f"MODEL.CLASSIFIER.NUM_CLASSES is {num_classes}, but {which} has {len(dataset.class_names)} classes."
        )
