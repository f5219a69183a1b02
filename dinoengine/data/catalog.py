"""The tables behind dataset strings, and the dataset that a string names. The grammar is in ``dataset_string``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from dinoengine.data.dataset import ConcatImageDataset, ImageDataset
from dinoengine.data.dataset_string import GRAMMAR, arguments_for, misspelt_key, parse
from dinoengine.utils.registry import Registry, UnknownNameError, suggest

DATASET_REGISTRY = Registry("DATASET")
DATASET_REGISTRY.__doc__ = """Name -> a class or function that returns an ImageDataset.

Its parameters, annotated str, int, float or bool, are the keys of the dataset string; the first one may be given
without its name if it has no default, or an empty string as default.
"""


class _DatasetCatalog:
    """Names for datasets of your own: ``DatasetCatalog.register("my_photos", lambda: MyDataset(...))``."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], ImageDataset]] = {}

    def register(self, name: str, maker: Callable[[], ImageDataset]) -> None:
        """
        Args:
            name: without ``:``; usable wherever a dataset is named.
            maker: called without arguments each time the dataset is needed.

        Raises:
            ValueError: if the name is taken or contains ``:``.
        """
        if name in self._makers or name in DATASET_REGISTRY:
            raise ValueError(f"A dataset named {name!r} is registered already. Registered: {', '.join(self.list())}.")
        if ":" in name or not name:
            raise ValueError(f"A dataset name is not empty and has no ':', got {name!r}.")
        self._makers[name] = maker

    def get(self, name: str) -> ImageDataset:
        """Make the dataset registered under ``name``; KeyError lists the names."""
        if name not in self._makers:
            raise UnknownNameError(
                f"Dataset {name!r} is not registered. Registered: {', '.join(self.list()) or 'none'}."
            )
        return self._makers[name]()

    def list(self) -> list[str]:
        return sorted(self._makers)

    def remove(self, name: str) -> None:
        """Forget a name (tests, notebooks)."""
        self._makers.pop(name)

    def __contains__(self, name: str) -> bool:
        return name in self._makers


class _Metadata(SimpleNamespace):
    """Attributes that can be set once; setting another value later is an error."""

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.__dict__ and self.__dict__[key] != value:
            raise ValueError(
                f"Metadata attribute {key!r} is {self.__dict__[key]!r} already; it cannot become {value!r}."
            )
        super().__setattr__(key, value)

    def set(self, **values: Any) -> _Metadata:
        for key, value in values.items():
            setattr(self, key, value)
        return self


class _MetadataCatalog:
    """Facts about datasets by name: ``MetadataCatalog.get("my_photos").set(licence="CC0")``."""

    def __init__(self) -> None:
        self._entries: dict[str, _Metadata] = {}

    def get(self, name: str) -> _Metadata:
        return self._entries.setdefault(name, _Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


def build_dataset(text: str) -> ImageDataset:
    """The dataset that a string names.

    Raises:
        ValueError: if the string does not fit the grammar or the dataset's parameters; shows both. If the dataset is empty,
            or two of its classes have one name.
        KeyError: for an unknown name; lists the known ones.
        FileNotFoundError: from the dataset, if its files are missing.
    """
    dataset = _make(text)
    if not len(dataset):
        raise ValueError(f"Dataset {text!r} holds no image.")
    for names in (dataset.class_names, dataset.multi_label_class_names, dataset.mask_class_names):
        if names is not None and len(set(names)) < len(names):
            twice = [name for name, count in Counter(names).items() if count > 1]
            raise ValueError(
                f"Dataset {text!r} has {len(names)} classes, and {len(twice)} name(s) stand for more than one of them: "
                f"{', '.join(map(repr, twice[:5]))}. Classes of different sets are matched by name; give each its own."
            )
    return dataset


# Errors of a dataset that another string would not meet.
_OF_THE_STRING = (FileNotFoundError, NotADirectoryError, PermissionError, ValueError)


def _make(text: str) -> ImageDataset:
    text = text.lstrip()  # as lists on a command line leave it: "a, b" is 'a' and ' b'
    if text in DatasetCatalog:
        return DatasetCatalog.get(text)
    name = parse(text).name
    if name not in DATASET_REGISTRY:
        if name in DatasetCatalog:
            raise ValueError(f"Dataset {name!r} was registered without parameters, so it takes no keys; got {text!r}.")
        known = [*DATASET_REGISTRY.names(), *DatasetCatalog.list()]
        hint = suggest(name, known)
        if not hint and ("/" in text or text.startswith(("~", "."))):
            hint = f" (for a folder of images write 'folder:{text}')"
        raise UnknownNameError(
            f"No dataset {name!r} (in {text!r}){hint}. Known: {', '.join(known)}. Grammar: {GRAMMAR}."
        )
    builder = DATASET_REGISTRY.get(name)
    arguments = arguments_for(text, builder)
    try:
        dataset: ImageDataset = builder(**arguments)
    except _OF_THE_STRING as error:
        # What a dataset says is of the paths it made of the string, or of the library it wraps.
        kind = next(kind for kind in _OF_THE_STRING if isinstance(error, kind))
        said = f"{error}" if repr(text) in str(error) else f"Dataset {text!r}: {error}"
        hint = misspelt_key(text, builder)
        separator = "\n" if "\n" in said else " "
        raise kind(f"{said}{separator}{hint}" if hint else said) from error
    return dataset


def build_datasets(texts: Iterable[str]) -> ImageDataset:
    """One dataset from several strings, concatenated in order.

    Raises:
        ValueError: if there is none.
    """
    datasets = [build_dataset(text) for text in texts]
    if not datasets:
        raise ValueError(f"No dataset is named; expected at least one of the form {GRAMMAR}.")
    return datasets[0] if len(datasets) == 1 else ConcatImageDataset(datasets)
