"""Datasets of the library ``datasets`` of Hugging Face."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.utils.registry import suggest

# What Dataset.save_to_disk and DatasetDict.save_to_disk write.
_SAVED = ("state.json", "dataset_dict.json")


@DATASET_REGISTRY.register("hf")
class HuggingFaceDataset(ImageDataset):
    """``hf:/path-or-name[:split=train][:image=image][:label=label][:config=name]``, with ``pip install datasets``.

    A folder that ``save_to_disk`` wrote is memory-mapped as it is; anything else goes to ``load_dataset``, for which a
    name is one of the hub. No code that comes with a dataset is run.
    """

    def __init__(
        self, path: str, split: str = "train", image: str = "image", label: str = "", config: str = ""
    ) -> None:
        """
        Args:
            image, label: columns; ``label`` empty: the column "label" if there is one.
            config: of a dataset that has several.

        Raises:
            ValueError: without the library, for a split or column that is not there, a column without images, or no row.
        """
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"hf:{path} needs the library datasets: pip install 'dinoengine[hf]'.") from error
        self.text = f"hf:{path}:split={split}"
        local = os.path.expanduser(path)
        if any(os.path.isfile(os.path.join(local, name)) for name in _SAVED):
            data: Any = datasets.load_from_disk(local)
        else:
            data = datasets.load_dataset(local if os.path.exists(local) else path, config or None)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(
                    f"{self.text}: there is no such split{suggest(split, list(data))}; splits: {', '.join(data)}."
                )
            data = data[split]
        columns = data.column_names
        label = label or ("label" if "label" in columns else "")
        for key, name in (("image", image), ("label", label)):
            if name and name not in columns:
                hint = suggest(name, columns)
                raise ValueError(
                    f"{self.text} has no column {name!r}{hint}; columns: {', '.join(columns)}. Write {key}=NAME."
                )
        if not isinstance(data.features[image], datasets.Image):
            raise ValueError(
                f"{self.text}: column {image!r} holds no images but {data.features[image]}. Write image=NAME."
            )
        if not len(data):
            raise ValueError(f"{self.text} has no row.")
        self._labels: np.ndarray | None = None
        if label:
            self._set_labels(data[label], getattr(data.features[label], "names", None))
        self._column = image
        # As they are stored, so that every kind of dataset decodes images in the same way.
        self._data = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int) -> Any:
        """
        Raises:
            UnreadableImageError: if it is no image or cannot be read; names row and path.
        """
        stored = self._data[index][self._column]
        if stored["bytes"] is None:
            return self.read_file(stored["path"])
        return self.read_bytes(stored["bytes"], self.describe(index))

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def describe(self, index: int) -> str:
        return f"{self.text}[{index}]"

    def _set_labels(self, column: Any, names: list[str] | None) -> None:
        values = np.asarray(list(column))
        if names is None:
            found, labels = np.unique(values, return_inverse=True)
            names = [str(value) for value in found]
        else:
            labels = values
        if labels.min() >= 0:  # -1: a test set whose labels are not told
            self._labels, self.class_names = labels.astype(np.int32), list(names)
