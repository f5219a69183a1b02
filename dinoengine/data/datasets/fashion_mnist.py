"""Fashion-MNIST: 70,000 real grey pictures of ten kinds of clothes, 28 x 28."""

from __future__ import annotations

import gzip
import os
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.utils.registry import suggest

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPLITS = {"train": "train", "test": "t10k"}
# Where Debian's package dataset-fashion-mnist puts it, and where torchvision.datasets.FashionMNIST("data") does.
DEFAULT_ROOTS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
# Of the largest file, unpacked: 60,000 images and a header. A packed file may ask for any amount of memory.
_MAX_BYTES = 60_000 * 28 * 28 + 16


@DATASET_REGISTRY.register("fashion-mnist")
class FashionMNIST(ImageDataset):
    """``fashion-mnist:split=train|test[:root=/path]``: 60,000 and 10,000 images (arXiv:1708.07747).

    Reads the four idx files, packed with gzip or not. Without ``root`` the places of Debian's package
    ``dataset-fashion-mnist`` and of torchvision are tried; nothing is downloaded.
    """

    def __init__(self, split: str = "train", root: str = "") -> None:
        """
        Raises:
            ValueError: for another split, or a file that is no idx file.
            FileNotFoundError: if the files are nowhere; says how to get them.
        """
        if split not in SPLITS:
            hint = suggest(split, list(SPLITS))
            raise ValueError(f"fashion-mnist has the splits {', '.join(SPLITS)}; got {split!r}{hint}.")
        roots = (os.path.expanduser(root),) if root else DEFAULT_ROOTS
        self.split = split
        self._images = _read_idx(roots, f"{SPLITS[split]}-images-idx3-ubyte")  # [n, 28, 28] uint8
        self._labels = _read_idx(roots, f"{SPLITS[split]}-labels-idx1-ubyte")  # [n] uint8
        if len(self._images) != len(self._labels):
            raise ValueError(
                f"fashion-mnist in {roots[0]} has {len(self._images)} images and {len(self._labels)} labels; get it anew."
            )
        self.class_names = list(CLASSES)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self._images[index])

    def label(self, index: int) -> int | None:
        return int(self._labels[index])

    def describe(self, index: int) -> str:
        return f"fashion-mnist:split={self.split}[{index}]"


def _read_idx(roots: tuple[str, ...], name: str) -> np.ndarray:
    """The uint8 array of an idx file: two zero bytes, type 8, number of dimensions, sizes (big-endian), values."""
    paths = [os.path.join(root, name + ending) for root in roots for ending in ("", ".gz")]
    path = next((p for p in paths if os.path.isfile(p)), None)
    if path is None:
        raise FileNotFoundError(
            f"Fashion-MNIST is not there: no {name}[.gz] in {' or '.join(roots)}. Install Debian's package "
            "dataset-fashion-mnist, or run torchvision.datasets.FashionMNIST('data', download=True) once, or name its "
            "folder: fashion-mnist:split=train:root=/path."
        )
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); get it anew.") from error
    num_dimensions = data[3] if len(data) > 3 else 0
    start = 4 + 4 * num_dimensions
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if data[:3] != b"\x00\x00\x08" or len(data) - start != np.prod(sizes, dtype=np.int64):
        raise ValueError(f"{path} is not a complete idx file of bytes; get it anew.")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(sizes)
