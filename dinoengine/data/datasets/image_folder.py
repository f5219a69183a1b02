"""Any nested folder of images."""

from __future__ import annotations

import os

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import FileDataset
from dinoengine.data.file_index import FileIndex, index_folder
from dinoengine.data.folder_scan import ARRAY_EXTENSIONS, EXTENSIONS
from dinoengine.utils.file_io import is_url


class IndexedImages(FileDataset):
    """Image files that an index lists, with its labels."""

    def __init__(self, index: FileIndex) -> None:
        self.index = index
        self.root = index.root
        self.class_names = index.class_names
        self.file_labels = index.labels

    def __len__(self) -> int:
        return len(self.index)

    def path(self, index: int) -> str:
        """Absolute path of the image at ``index``."""
        return self.index.path(index)

    def fingerprint(self) -> str:
        return self.index.fingerprint()

    @property
    def index_files(self) -> list[str]:
        return self.index.files


@DATASET_REGISTRY.register("folder")
class ImageFolder(IndexedImages):
    """``folder:/path[:cached=false][:arrays=true]``: every image below a folder, or a URL that can be listed, sorted.

    The label of an image is its first-level folder (``/path/cat/sub/1.jpg`` is a "cat"). Images that lie directly in
    the folder make the whole dataset unlabelled: pretraining does not care, an evaluation says so. The index of a large
    folder is kept (``file_index``).
    """

    def __init__(self, root: str, cached: bool = True, arrays: bool = False) -> None:
        """
        Args:
            cached: False: scan the folder each time.
            arrays: True: the .npy files below the folder instead of pictures, for INPUT.FORMAT "channels".

        Raises:
            FileNotFoundError: if ``root`` does not exist or holds no image.
            NotADirectoryError: if it is a file.
            OSError: if a folder below it cannot be listed.
            ValueError: for a URL that cannot be listed; says why.
        """
        extensions = ARRAY_EXTENSIONS if arrays else EXTENSIONS
        if is_url(root):
            super().__init__(index_folder(root.rstrip("/"), extensions=extensions))
            return
        where = os.path.abspath(os.path.expanduser(root))
        if not os.path.exists(where):
            raise FileNotFoundError(f"Image folder {where} does not exist.")
        if not os.path.isdir(where):
            raise NotADirectoryError(f"{where} is a file, not a folder of images.")
        super().__init__(index_folder(where, cached=cached, extensions=extensions))
