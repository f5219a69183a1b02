"""The classification task of PASCAL VOC 2007, a multi-label dataset (doi:10.1007/s11263-009-0275-4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.datasets.image_folder import ImageFolder
from dinoengine.data.fingerprint import fingerprint
from dinoengine.utils.file_io import local_folder
from dinoengine.utils.registry import suggest

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SPLITS = ("train", "val", "trainval", "test")
_VALUES = {"1": 1, "0": 0, "-1": -1}


@DATASET_REGISTRY.register("voc2007")
class VOC2007(ImageDataset):
    """``voc2007:root=/data/VOCdevkit/VOC2007:split=train|val|trainval|test``: which of 20 classes an image shows.

    ``ImageSets/Main/<class>_<split>.txt`` has a line for each image: its name, and 1 if it shows the class, -1 if it does
    not, 0 if it shows difficult objects of the class only. The images are ``JPEGImages/<name>.jpg``.
    """

    def __init__(self, root: str, split: str = "trainval") -> None:
        """
        Args:
            root: the folder VOC2007.

        Raises:
            FileNotFoundError: if a folder, the file of a class or an image is missing.
            ValueError: for another split, or if a file of a class has other lines or other images than it should.
        """
        if split not in SPLITS:
            raise ValueError(
                f"voc2007 has the splits {', '.join(SPLITS)}; got {split!r}{suggest(split, list(SPLITS))}."
            )
        root = local_folder(root)
        pictures, lists = os.path.join(root, "JPEGImages"), os.path.join(root, "ImageSets", "Main")
        for folder in (pictures, lists):
            if not os.path.isdir(folder):
                raise FileNotFoundError(
                    f"There is no folder {folder}. The root of voc2007 is the folder VOC2007 of VOCdevkit, with JPEGImages "
                    f"and ImageSets/Main; got root={root}."
                )
        paths = [os.path.join(lists, f"{name}_{split}.txt") for name in CLASSES]
        if missing := [path for path in paths if not os.path.isfile(path)]:
            raise FileNotFoundError(
                f"voc2007:split={split} needs a file for each of its {len(CLASSES)} classes, and {len(missing)} of "
                f"them are missing: {_some(missing)}. Those of the split test come with VOC's test data."
            )
        values = [_read(path) for path in paths]
        names = list(values[0])
        for path, of_class in zip(paths, values, strict=True):
            if different := sorted(of_class.keys() ^ values[0].keys()):
                raise ValueError(
                    f"{path} and {paths[0]} must name the same images, and only one of them has {_some(different)}."
                )
        self._images = ImageFolder(pictures)
        self._places = _places(self._images, names, paths[0])
        self._labels = np.array([[of_class[name] for of_class in values] for name in names], dtype=np.int8)  # [N, 20]
        self.multi_label_class_names: list[str] = list(CLASSES)

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, index: int) -> Any:
        return self._images.load(int(self._places[index]))

    def multi_label(self, index: int) -> np.ndarray:
        labels: np.ndarray = self._labels[index]
        return labels

    def describe(self, index: int) -> str:
        return self._images.path(int(self._places[index]))

    def fingerprint(self) -> str:
        return fingerprint(self._images.fingerprint(), self._places, self._labels)

    @property
    def index_files(self) -> list[str]:
        return self._images.index_files

    def limit_pixels(self, max_image_pixels: int) -> None:
        self._images.limit_pixels(max_image_pixels)

    def load_channels(self, num_channels: int) -> None:
        self._images.load_channels(num_channels)


def _read(path: str) -> Mapping[str, int]:
    """Image name -> 1, 0 or -1, in the order of the file."""
    values: dict[str, int] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2 or words[1] not in _VALUES:
                raise ValueError(
                    f"{path}, line {number}: expected the name of an image and 1, 0 or -1, got {line.strip()!r}."
                )
            if words[0] in values:
                raise ValueError(f"{path}, line {number}: the image {words[0]} is named a second time.")
            values[words[0]] = _VALUES[words[1]]
    if not values:
        raise ValueError(f"{path} names no image.")
    return values


def _places(images: ImageFolder, names: list[str], listed_in: str) -> np.ndarray:
    """[names] int64: where each image is in the folder."""
    paths = (os.path.relpath(images.path(i), images.root) for i in range(len(images)))
    place = {os.path.splitext(path)[0]: i for i, path in enumerate(paths)}
    if missing := [name for name in names if name not in place]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} images that {listed_in} names are not in {images.root}: {_some(missing)}."
        )
    return np.array([place[name] for name in names], dtype=np.int64)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
