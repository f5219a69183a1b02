"""Any nested folder of images."""

from __future__ import annotations

import os
from collections import Counter, deque
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.decode import read_image

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)


@DATASET_REGISTRY.register("folder")
class ImageFolder(ImageDataset):
    """``folder:/path``: every image below a folder, in sorted order.

    The label of an image is its first-level folder (``/path/cat/sub/1.jpg`` is a "cat"). Images that lie directly in
    the folder make the whole dataset unlabelled: pretraining does not care, an evaluation says so.
    """

    def __init__(self, root: str) -> None:
        """
        Raises:
            FileNotFoundError: if ``root`` does not exist or holds no image.
            NotADirectoryError: if it is a file.
        """
        self.root = os.path.abspath(os.path.expanduser(root))
        if not os.path.exists(self.root):
            raise FileNotFoundError(f"Image folder {self.root} does not exist (dataset 'folder:{root}').")
        if not os.path.isdir(self.root):
            raise NotADirectoryError(f"{self.root} is a file, not a folder of images (dataset 'folder:{root}').")
        paths, others = _scan(self.root)
        if not paths:
            found = ", ".join(f"{n} x {ext or 'no extension'}" for ext, n in others.most_common(5)) or "nothing"
            raise FileNotFoundError(
                f"Image folder {self.root} holds no image; found {found}. "
                f"Accepted extensions: {' '.join(sorted(EXTENSIONS))}."
            )
        tops = [path.split(os.sep, 1)[0] if os.sep in path else None for path in paths]
        self._labels: np.ndarray | None = None
        if None not in tops:
            self.class_names = sorted({top for top in tops if top is not None})
            index = {name: i for i, name in enumerate(self.class_names)}
            self._labels = np.array([index[top] for top in tops if top is not None], dtype=np.int64)
        # One byte string and offsets instead of a list of str: forked workers share its pages (a list's reference
        # counts would copy them), and it takes a fraction of the memory.
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> str:
        """Absolute path of the image at ``index``."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._bytes[start : self._ends[index]].tobytes()))

    def load(self, index: int) -> Any:
        """Decode the file; see ``decode.read_image``.

        Raises:
            UnreadableImageError: if it is no image or cannot be read; names the path.
        """
        return read_image(self.path(index), self.max_image_pixels)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def describe(self, index: int) -> str:
        return self.path(index)


def _scan(root: str) -> tuple[list[str], Counter[str]]:
    """Sorted paths of the images below ``root``, relative to it, and the extensions of the other files."""
    paths: list[str] = []
    others: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()
    folders = deque([root])
    while folders:
        folder = folders.popleft()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above would never end
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            # Sorted, so that a folder with two names (a link) is always taken under the same one.
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    paths.append(os.path.relpath(entry.path, root))
                else:
                    others[os.path.splitext(entry.name)[1].lower()] += 1
    return sorted(paths), others
