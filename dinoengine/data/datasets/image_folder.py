"""Any nested folder of images."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.decode import read_image
from dinoengine.data.file_index import FileIndex, index_folder
from dinoengine.utils.file_io import is_url


class IndexedImages(ImageDataset):
    """Image files that an index lists, with its labels."""

    def __init__(self, index: FileIndex) -> None:
        self.index = index
        self.root = index.root
        self.class_names = index.class_names

    def __len__(self) -> int:
        return len(self.index)

    def path(self, index: int) -> str:
        """Absolute path of the image at ``index``."""
        return self.index.path(index)

    def load(self, index: int) -> Any:
        """Decode the file; see ``decode.read_image``.

        Raises:
            UnreadableImageError: if it is no image or cannot be read; names the path.
        """
        return read_image(self.path(index), self.max_image_pixels)

    def label(self, index: int) -> int | None:
        return None if self.index.labels is None else int(self.index.labels[index])

    def labels(self) -> np.ndarray:
        return super().labels() if self.index.labels is None else self.index.labels

    def describe(self, index: int) -> str:
        return self.path(index)


@DATASET_REGISTRY.register("folder")
class ImageFolder(IndexedImages):
    """``folder:/path[:cached=false]``: every image below a folder, or a URL that can be listed, in sorted order.

    The label of an image is its first-level folder (``/path/cat/sub/1.jpg`` is a "cat"). Images that lie directly in
    the folder make the whole dataset unlabelled: pretraining does not care, an evaluation says so. The index of a large
    folder is kept (``file_index``).
    """

    def __init__(self, root: str, cached: bool = True) -> None:
        """
        Args:
            cached: False: scan the folder each time.

        Raises:
            FileNotFoundError: if ``root`` does not exist or holds no image.
            NotADirectoryError: if it is a file.
            OSError: if a folder below it cannot be listed.
            ValueError: for a URL that cannot be listed; says why.
        """
        if is_url(root):
            super().__init__(index_folder(root.rstrip("/")))
            return
        where = os.path.abspath(os.path.expanduser(root))
        if not os.path.exists(where):
            raise FileNotFoundError(f"Image folder {where} does not exist (dataset 'folder:{root}').")
        if not os.path.isdir(where):
            raise NotADirectoryError(f"{where} is a file, not a folder of images (dataset 'folder:{root}').")
        super().__init__(index_folder(where, cached=cached))
