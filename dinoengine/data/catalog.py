"""Dataset strings and the tables behind them.

Grammar: ``name[:argument][:key=value]...``, for example ``folder:/data/cats``, ``digits:split=test``,
``synthetic:num_images=100:size=32``, or a name registered in DatasetCatalog. Keys are recognised from the right and
only if the dataset has such a parameter, so the argument may itself contain ``:`` and ``=``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

from dinoengine.data.dataset import ConcatImageDataset, ImageDataset
from dinoengine.utils.registry import Registry, UnknownNameError, suggest

GRAMMAR = "name[:argument][:key=value]..., e.g. folder:/path/to/images or digits:split=train"

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
        ValueError: if the string does not fit the grammar or the dataset's parameters; shows both.
        KeyError: for an unknown name; lists the known ones.
        FileNotFoundError: from the dataset, if its files are missing.
    """
    if text in DatasetCatalog:
        return DatasetCatalog.get(text)
    name, _, rest = text.partition(":")
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
    arguments = _parse_arguments(text, rest, builder)
    dataset: ImageDataset = builder(**arguments)
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


def _parse_arguments(text: str, rest: str, builder: Callable[..., ImageDataset]) -> dict[str, Any]:
    parameters = inspect.signature(builder).parameters
    target = builder.__init__ if inspect.isclass(builder) else builder
    types = get_type_hints(target)
    arguments: dict[str, Any] = {}
    parts = rest.split(":") if rest else []
    while parts:
        key, equals, value = parts[-1].partition("=")
        if not equals or key not in parameters:
            break
        if key in arguments:
            raise ValueError(f"Dataset {text!r} gives {key!r} twice.")
        arguments[key] = _typed(value, types.get(key, str), key, text)
        parts.pop()
    if parts:
        first = next(iter(parameters), None)
        argument = ":".join(parts)
        # A parameter without default (folder's root) takes free text; others must be named, so typos are seen.
        if first is None or first in arguments or parameters[first].default not in (inspect.Parameter.empty, ""):
            key = parts[-1].partition("=")[0]
            raise ValueError(
                f"Dataset {text!r}: {argument!r} is not understood{suggest(key, list(parameters))}. "
                f"Its keys: {', '.join(parameters) or 'none'}. Grammar: {GRAMMAR}."
            )
        arguments[first] = argument
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ValueError(f"Dataset {text!r} needs {', '.join(missing)}. Grammar: {GRAMMAR}.")
    return arguments


def _typed(value: str, kind: Any, key: str, text: str) -> Any:
    kind = next((k for k in get_args(kind) if k is not type(None)), kind)  # `int | None` takes an int
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"Dataset {text!r}: {key} must be {kind.__name__}, got {value!r}.") from None
