"""A folder of images and a folder of masks that say the class of each pixel."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.datasets.image_folder import ImageFolder
from dinoengine.data.decode import read_size
from dinoengine.data.fingerprint import fingerprint
from dinoengine.structures import IGNORE
from dinoengine.utils.file_io import local_folder

CLASSES_FILE = "classes.txt"
_MASK_EXTENSION = ".png"
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


@DATASET_REGISTRY.register("masks")
class MaskFolder(ImageDataset):
    """``masks:/data`` (with ``/data/images``, ``/data/masks``) or ``masks:images=/path:masks=/path``.

    The mask of ``images/a/1.jpg`` is ``masks/a/1.png``, an indexed or grey PNG whose values are class ids. Names of the
    classes, one per line from class 0, stand in ``classes.txt`` in the root or, with ``masks=``, in the folder of masks;
    without that file ``num_classes=`` says how many there are, at most 255, and they are called by their numbers.
    """

    def __init__(
        self, root: str = "", images: str = "", masks: str = "", num_classes: int = 0, ignore: int = IGNORE
    ) -> None:
        """
        Args:
            num_classes: 0: those of classes.txt.
            ignore: mask value of pixels without a class.

        Raises:
            FileNotFoundError, NotADirectoryError: if a folder is missing or holds no image, or nothing says the classes.
            ValueError: if images and masks do not belong together one to one, or the keys contradict each other.
        """
        if bool(root) == bool(images or masks) or bool(images) != bool(masks):
            raise ValueError(
                "A dataset with masks is named masks:/data (with /data/images and /data/masks) or "
                f"masks:images=/path:masks=/path; got root={root!r}, images={images!r}, masks={masks!r}."
            )
        if not 0 <= ignore <= IGNORE:
            raise ValueError(f"Masks have values 0..{IGNORE}, so ignore must be one of them; got ignore={ignore}.")
        images, masks = (os.path.join(root, "images"), os.path.join(root, "masks")) if root else (images, masks)
        images, masks = local_folder(images), local_folder(masks)
        self._images, self._masks = ImageFolder(images), ImageFolder(masks)
        self._mask_of = _pairs(self._images, self._masks)
        self.ignore = ignore
        self.mask_class_names: list[str] = _class_names(os.path.join(root or masks, CLASSES_FILE), num_classes)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Any:
        return self._images.load(index)

    def load_mask(self, index: int) -> np.ndarray:
        """
        Raises:
            UnreadableImageError: if the file is no image.
            ValueError: if it is in colour, not of the size of its image, or has values that are no class.
        """
        which = int(self._mask_of[index])
        mask, path = self._masks.load(which), self._masks.path(which)
        if mask.mode not in _MASK_MODES:
            raise ValueError(
                f"{path} is a {mask.mode} image; a mask is an indexed or grey PNG whose values are class ids."
            )
        width, height = read_size(self._images.path(index))
        if (width, height) != mask.size:
            raise ValueError(
                f"The mask {path} has {mask.size[0]} x {mask.size[1]} pixels (width x height), its image "
                f"{width} x {height}; they must be the same."
            )
        values = np.array(mask, dtype=np.int64)
        num_classes = len(self.mask_class_names)
        ignored = values == self.ignore
        wrong = np.unique(values[~ignored & ((values < 0) | (values >= num_classes))])
        if len(wrong):
            raise ValueError(
                f"The mask {path} has the value(s) {', '.join(map(str, wrong[:5]))}, and there are classes "
                f"0..{num_classes - 1}; pixels without a class have the value {self.ignore} (key ignore=)."
            )
        values[ignored] = IGNORE
        return values.astype(np.uint8)

    def path(self, index: int) -> str:
        return self._images.path(index)

    def describe(self, index: int) -> str:
        return self._images.describe(index)

    def fingerprint(self) -> str:
        return fingerprint(self._images.fingerprint(), self._masks.fingerprint(), *self.mask_class_names)

    @property
    def index_files(self) -> list[str]:
        return self._images.index_files + self._masks.index_files

    def limit_pixels(self, max_image_pixels: int) -> None:
        self._images.limit_pixels(max_image_pixels)
        self._masks.limit_pixels(max_image_pixels)

    def load_channels(self, num_channels: int) -> None:
        self._images.load_channels(num_channels)


def _pairs(images: ImageFolder, masks: ImageFolder) -> np.ndarray:
    """[images] int64: the mask of each."""
    image_names, mask_names = _names(images), _names(masks)
    for folder, names in ((images, image_names), (masks, mask_names)):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"{folder.root} has several files of the name {_first(twice)} that differ in their extension only, so it "
                "is not clear which mask belongs to which image."
            )
    if colour := [masks.path(i) for i in range(len(masks)) if not masks.path(i).lower().endswith(_MASK_EXTENSION)]:
        raise ValueError(f"Masks are PNG files, and {len(colour)} of {masks.root} are not: {_first(colour)}.")
    place = {name: i for i, name in enumerate(mask_names)}
    known = set(image_names)
    without = [name for name in image_names if name not in place]
    extra = [name for name in mask_names if name not in known]
    if without or extra:
        raise ValueError(
            f"Images of {images.root} and masks of {masks.root} must have the same names (but for the extension): "
            f"{len(without)} image(s) have no mask{_listed(without)}, {len(extra)} mask(s) have no image{_listed(extra)}."
        )
    return np.array([place[name] for name in image_names], dtype=np.int64)


def _names(folder: ImageFolder) -> list[str]:
    return [os.path.splitext(os.path.relpath(folder.path(i), folder.root))[0] for i in range(len(folder))]


def _class_names(path: str, num_classes: int) -> list[str]:
    path = os.path.abspath(os.path.expanduser(path))
    names = [str(i) for i in range(num_classes)]
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"{path} must have one name per class and line, none empty, none twice.")
        if num_classes not in (0, len(names)):
            raise ValueError(f"{path} names {len(names)} classes, and num_classes={num_classes} was given.")
    elif not num_classes:
        raise FileNotFoundError(
            f"Nothing says which classes the masks have: write their names into {path}, one per line, or add "
            ":num_classes=N to the dataset string."
        )
    if not 1 <= len(names) <= IGNORE:
        raise ValueError(f"A dataset with masks has 1 to {IGNORE} classes, got {len(names)}.")
    return names


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _listed(names: list[str]) -> str:
    return f" ({_first(names)})" if names else ""
