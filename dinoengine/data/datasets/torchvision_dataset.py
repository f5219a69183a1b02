"""The datasets of torchvision."""

from __future__ import annotations

import inspect
import logging
import operator
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.data.dataset_string import converted
from dinoengine.utils.registry import UnknownNameError, suggest

# Where torchvision keeps the labels: lists of numbers, or of (file, number).
_LABEL_LISTS = ("targets", "labels", "_labels", "y", "samples", "_samples")

logger = logging.getLogger(__name__)


@DATASET_REGISTRY.register("torchvision")
class TorchvisionDataset(ImageDataset):
    """``torchvision:CIFAR10:root=/data:train=true``: any dataset of torchvision whose items begin with a picture.

    The keys are the parameters of its class. There are labels where the second part of an item is one whole number and it
    is known how many classes there are. Nothing is downloaded without ``download=true``. Torchvision reads the files, some
    of them with pickle: use only those you trust.
    """

    def __init__(self, dataset: str, **options: Any) -> None:
        """
        Args:
            dataset: name of a class in ``torchvision.datasets``.

        Raises:
            KeyError: if torchvision has no such dataset.
            FileNotFoundError: if its files are missing or damaged.
            ValueError: for an option it does not take, a value of another type, or a dataset without pictures or items.
        """
        self.name = dataset
        self._data: Any = _made(_class(dataset), _arguments(dataset, options))
        if not len(self._data):
            raise ValueError(f"torchvision:{dataset} has no image with these keys: {options}.")
        first = self._data[0]
        if not isinstance(first, tuple) or not hasattr(first[0], "convert"):
            raise ValueError(
                f"An item of torchvision:{dataset} does not begin with a picture, but is a {type(first).__name__}."
            )
        self._labels = self._find_labels()
        self.class_names = self._find_names()

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int) -> Any:
        return self._data[index][0]

    def label(self, index: int) -> int | None:
        """Of a few datasets the image has to be decoded for it."""
        if self.class_names is None:
            return None
        return int(self._labels[index]) if self._labels is not None else _number(self._data[index])

    def describe(self, index: int) -> str:
        return f"torchvision:{self.name}[{index}]"

    def _find_labels(self) -> np.ndarray | None:
        """[images] int64, if some attribute holds those that the items have."""
        probed = {i: _number(self._data[i]) for i in {0, len(self) // 2, len(self) - 1}}
        for name in _LABEL_LISTS:
            values = getattr(self._data, name, None)
            if values is None or not hasattr(values, "__len__") or len(values) != len(self):
                continue
            if name.endswith("samples"):
                values = [value[1] for value in values if isinstance(value, tuple) and len(value) == 2]
            try:
                labels = np.array([operator.index(v) for v in np.asarray(values).tolist()], dtype=np.int64)
            except (TypeError, ValueError):
                continue
            if len(labels) == len(self) and all(labels[i] == number for i, number in probed.items()):
                return labels
        return None

    def _find_names(self) -> list[str] | None:
        if _number(self._data[0]) is None:
            return None
        least = 1 if self._labels is None else int(self._labels.max()) + 1
        if self._labels is not None and self._labels.min() < 0:
            return None
        names = [", ".join(n) if isinstance(n, tuple) else str(n) for n in getattr(self._data, "classes", None) or ()]
        if len(names) >= least:
            return names if len(set(names)) == len(names) else [f"{i} {name}" for i, name in enumerate(names)]
        count = getattr(self._data, "num_classes", 0) if self._labels is None else least
        if not count:
            logger.warning(f"torchvision:{self.name} does not say how many classes it has; it is used without labels.")
        return [str(i) for i in range(count)] or None


def _class(name: str) -> Any:
    from torchvision import datasets

    known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
    if name not in known:
        raise UnknownNameError(
            f"torchvision has no dataset {name!r}{suggest(name, known)}. Write torchvision:NAME:key=value..., "
            f"NAME one of: {', '.join(sorted(known))}."
        )
    return getattr(datasets, name)


def _made(kind: Any, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except RuntimeError as error:  # its word for files that are missing or damaged
        key = "download=True"
        said = str(error)
        if key in said and "download" in arguments:
            said = f"{said.replace(key, 'the key download=true')} (here: at the end of the string, :download=true)"
        raise FileNotFoundError(f"torchvision says: {said.rstrip('.')}.") from error


def _arguments(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the class wants them: its parameters, and, where it passes on others, those of its bases."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in _class(name).__mro__:
        own = inspect.signature(base.__init__).parameters
        parameters = {**own, **parameters}
        if "kwargs" not in own:
            break
    parameters = {k: p for k, p in parameters.items() if k not in ("self", "kwargs") and "transform" not in k}
    text = f"torchvision:{name}"
    arguments = {}
    for key, value in options.items():
        if key not in parameters:
            raise ValueError(
                f"Dataset {text!r}: {key!r} is not understood{suggest(key, list(parameters))}. "
                f"Its keys: {', '.join(parameters)}."
            )
        arguments[key] = _converted(text, key, value, parameters[key])
    if missing := [k for k, p in parameters.items() if p.default is p.empty and k not in arguments]:
        raise ValueError(f"Dataset {text!r} needs {', '.join(missing)}; write {text}:{missing[0]}=...")
    if "download" in parameters:  # of some it is the default
        arguments.setdefault("download", False)
    return arguments


def _converted(text: str, key: str, value: Any, parameter: inspect.Parameter) -> Any:
    default, annotation = parameter.default, str(parameter.annotation)
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(converted(text, key, part, type(default[0])) for part in parts)
    if isinstance(default, (bool, int, float)):
        return converted(text, key, value, type(default))
    return converted(text, key, value, int if "int" in annotation and "str" not in annotation else str)


def _number(item: Any) -> int | None:
    """The label of an item; None if its second part is no single whole number."""
    try:
        return operator.index(item[1])
    except (TypeError, IndexError):
        return None
