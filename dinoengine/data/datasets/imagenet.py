"""The layout of ImageNet-1k, with the index files of DINOv2 and without them."""

from __future__ import annotations

import logging
import os

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import FileDataset
from dinoengine.data.datasets import imagenet_extra
from dinoengine.data.file_index import MIN_IMAGES, FileIndex, index_folder
from dinoengine.data.fingerprint import fingerprint
from dinoengine.utils.file_io import local_folder
from dinoengine.utils.registry import suggest

logger = logging.getLogger(__name__)

SPLITS = ("TRAIN", "VAL", "TEST")
LABELS_FILE = "labels.txt"


@DATASET_REGISTRY.register("ImageNet")
class ImageNet(FileDataset):
    """``ImageNet:split=TRAIN|VAL|TEST:root=/data[:extra=/extra]``, as the published code and its forks write it.

    The images of a split lie in ``root/train``, ``root/val`` or ``root/test``, in a folder per class (TEST may
    have none), under any names. Classes are called by their folders; ``labels.txt`` in the root gives readable names.

    ``extra`` holds ``entries-<SPLIT>.npy``, ``class-ids-<SPLIT>.npy`` and ``class-names-<SPLIT>.npy`` of a fork, which then
    say what the images are; otherwise the folder is scanned and the index kept there as ``<SPLIT>.index``, which takes
    precedence from then on: it is made anew when the folder changes, which the files of a fork are not. The log says where
    such files are passed over. Only the split that is asked for is looked at, and its length is what is found.

    Attributes:
        class_titles: readable name of each class, of which two may be the same; None without labels.
    """

    def __init__(self, root: str, split: str = "TRAIN", extra: str = "", cached: bool = True) -> None:
        """
        Args:
            cached: False: scan the folder, whatever index there is.

        Raises:
            ValueError: for another split, a damaged file of ``extra``, or one of other classes.
            FileNotFoundError: if the split has no folder, no image, or not the images that ``extra`` lists.
        """
        self.split = split.upper()
        if self.split not in SPLITS:
            raise ValueError(
                f"ImageNet has the splits {', '.join(SPLITS)}; got {split!r}{suggest(split, list(SPLITS))}."
            )
        self.root = local_folder(root)
        self.extra = local_folder(extra) if extra else ""
        self.folder = os.path.join(self.root, self.split.lower())
        if not os.path.isdir(self.folder):
            there = [name for name in SPLITS if os.path.isdir(os.path.join(self.root, name.lower()))]
            raise FileNotFoundError(
                f"ImageNet split {self.split} lies in the folder {self.folder}, which does not exist; splits in "
                f"{self.root}: {', '.join(there) or 'none'}."
            )
        kept = os.path.join(self.extra, f"{self.split}.index") if extra else ""
        self.index: FileIndex | None = None
        self._listed: imagenet_extra.Listed | None = None
        if cached and extra and not os.path.exists(kept) and imagenet_extra.is_there(self.extra, self.split):
            self._listed = imagenet_extra.read(self.extra, self.split, self.folder)
            self.class_names, self.class_titles = self._listed.class_ids, self._listed.class_titles
            self.file_labels = self._listed.labels
        else:
            self.index = index_folder(self.folder, cached=cached, keep_in=kept, min_images=1 if extra else MIN_IMAGES)
            self.class_names, self.file_labels = self.index.class_names, self.index.labels
            self.class_titles = None if self.class_names is None else self._titles(self.class_names)
            if cached and extra:
                self._tell_of_passed_over(kept)

    def __len__(self) -> int:
        if self._listed is not None:
            return len(self._listed.numbers)
        assert self.index is not None
        return len(self.index)

    def path(self, index: int) -> str:
        if self._listed is not None:
            return os.path.join(self.folder, self._listed.path(index))
        assert self.index is not None
        return self.index.path(index)

    def dump_extra(self, extra: str = "") -> list[str]:
        """Write ``entries``, ``class-ids`` and ``class-names`` of this split as forks of the published code expect them.

        Args:
            extra: the folder; empty: that of the dataset.

        Returns:
            The files.

        Raises:
            ValueError: if no folder is given, or images have names that such files cannot say.
        """
        extra = extra or self.extra
        if not extra:
            raise ValueError("dump_extra() needs a folder: ImageNet:split=...:root=...:extra=/folder.")
        paths = (os.path.relpath(self.path(i), self.folder) for i in range(len(self)))
        return imagenet_extra.write(
            extra, self.split, len(self), paths, self.file_labels, self.class_names or [], self.class_titles or []
        )

    def fingerprint(self) -> str:
        if self._listed is not None:
            return fingerprint(self._listed.numbers, self.file_labels, *(self.class_names or ()))
        assert self.index is not None
        return self.index.fingerprint()

    @property
    def index_files(self) -> list[str]:
        if self._listed is not None:
            return imagenet_extra.files_of(self.extra, self.split)
        assert self.index is not None
        return self.index.files

    def _tell_of_passed_over(self, kept: str) -> None:
        """Two things say what the images are: name the one that counts."""
        if not imagenet_extra.is_begun(self.extra, self.split):
            return
        files = imagenet_extra.files_of(self.extra, self.split)
        if missing := [file for file in files if not os.path.isfile(file)]:
            logger.warning("%s is not used, since %s is missing; the folder counts.", files[0], ", ".join(missing))
            return
        listed = imagenet_extra.num_listed(self.extra, self.split)
        logger.log(
            logging.INFO if listed == len(self) else logging.WARNING,
            "The images are those of %s (%s); %s beside it (%s) is not used. To go by the latter, remove the former.",
            kept,
            f"{len(self):,}",
            files[0],
            "damaged" if listed is None else f"{listed:,}",
        )

    def _titles(self, class_ids: list[str]) -> list[str]:
        path = os.path.join(self.root, LABELS_FILE)
        known = imagenet_extra.read_labels(path) if os.path.isfile(path) else {}
        return [known.get(name, name) for name in class_ids]
