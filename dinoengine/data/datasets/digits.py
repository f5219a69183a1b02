"""scikit-learn's digits: real scans that come inside its wheel."""

from __future__ import annotations

from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.utils.registry import suggest

NUM_TRAIN = 1437
SPLITS = {"train": slice(0, NUM_TRAIN), "test": slice(NUM_TRAIN, None), "all": slice(None)}


@DATASET_REGISTRY.register("digits")
class Digits(ImageDataset):
    """``digits:split=train|test|all``: 1,797 grey 8 x 8 scans of handwritten digits (UCI optdigits test set).

    The file is ordered by collection, so the last 360 (test) are mostly by other writers than the first 1,437
    (train): harder than a random split, and a fairer test.
    """

    def __init__(self, split: str = "train") -> None:
        """
        Raises:
            ValueError: for another split.
        """
        if split not in SPLITS:
            hint = suggest(split, list(SPLITS))
            raise ValueError(f"digits has the splits {', '.join(SPLITS)}; got {split!r}{hint}.")
        from sklearn.datasets import load_digits

        data = load_digits()
        self.split = split
        self._images = np.round(data.images[SPLITS[split]] * (255.0 / 16.0)).astype(np.uint8)  # [n, 8, 8], 0..16 before
        self._labels = data.target[SPLITS[split]].astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self._images[index])

    def label(self, index: int) -> int | None:
        return int(self._labels[index])

    def describe(self, index: int) -> str:
        return f"digits:split={self.split}[{index}]"
