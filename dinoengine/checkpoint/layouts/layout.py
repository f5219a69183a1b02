"""What a layout is: the names, shapes and containers in which one code base stores a vision transformer."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict, short_list
from dinoengine.checkpoint.weights import Weights


@dataclass(frozen=True)
class Hints:
    """Used where a file does not say: the number of attention heads, and (rows, columns) of a table that is no square."""

    num_heads: int | None = None
    table_grid: tuple[int, int] | None = None


class Layout(abc.ABC):
    """Reads and writes one layout.

    Attributes:
        name: as in ``--from`` and ``--to``.
        description: one line for people.
        is_folder: whether it is written as a folder (config.json and model.safetensors) instead of one file.
        is_nested: whether entries lie in dicts of dicts, which safetensors cannot hold.
        states_shape: whether written files say the number of attention heads and the grid of the position table.
        never_stores: entries of the backbone that files of this layout never have, by our names.
    """

    name: str
    description: str
    is_folder: bool = False
    is_nested: bool = False
    states_shape: bool = False
    never_stores: tuple[str, ...] = ()

    @abc.abstractmethod
    def detect(self, content: FileContent) -> bool:
        """Whether ``content`` is of this layout, by its keys."""

    @abc.abstractmethod
    def read(self, content: FileContent, hints: Hints) -> Weights:
        """Under dinoengine's names; CheckpointError if it cannot be read as this layout."""

    @abc.abstractmethod
    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        """The content of a file, and the names of the entries that this layout has no place for."""


class Rule(NamedTuple):
    """How entries are called elsewhere. ``{i}`` stands for the block; what is left of a name (.weight, .bias) is kept.

    Attributes:
        theirs: several names: the entry is cut into equal parts along its first dimension.
        export, load: change of the tensor on its way out and in, where its shape differs.
    """

    ours: str
    theirs: str | tuple[str, ...]
    export: Callable[[Tensor], Tensor] | None = None
    load: Callable[[Tensor], Tensor] | None = None

    @property
    def their_names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def rename_to_ours(entries: StateDict, rules: Sequence[Rule], path: str) -> tuple[StateDict, list[str]]:
    """Entries under our names, and the names that no rule knows.

    Raises:
        CheckpointError: if a part of an entry that is stored in several is missing.
    """
    ours: StateDict = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    unknown = []
    patterns = [(rule, i, _pattern(name)) for rule in rules for i, name in enumerate(rule.their_names)]
    for key, value in entries.items():
        for rule, piece, pattern in patterns:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            name = _fill(rule.ours, match)
            if len(rule.their_names) > 1:
                pieces.setdefault(name, {})[piece] = value
                if len(pieces[name]) == len(rule.their_names):
                    ours[name] = torch.cat([pieces[name][i] for i in range(len(rule.their_names))])
            else:
                ours[name] = rule.load(value) if rule.load else value
            break
        else:
            unknown.append(key)
    if partial := [name for name in pieces if name not in ours]:
        raise CheckpointError(f"{path} has only some of the parts that make up {short_list(partial)}.")
    return ours, unknown


def rename_to_theirs(entries: StateDict, rules: Sequence[Rule]) -> tuple[StateDict, list[str]]:
    """Entries under their names, and our names that no rule knows."""
    theirs: StateDict = {}
    unknown = []
    patterns = [(rule, _pattern(rule.ours)) for rule in rules]
    for key, value in entries.items():
        for rule, pattern in patterns:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            names = [_fill(name, match) for name in rule.their_names]
            values = value.chunk(len(names)) if len(names) > 1 else [rule.export(value) if rule.export else value]
            theirs.update(zip(names, (v.clone() for v in values), strict=True))
            break
        else:
            unknown.append(key)
    return theirs, unknown


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)") + r"(?P<leaf>\.weight|\.bias)?")


def _fill(template: str, match: re.Match[str]) -> str:
    return template.replace("{i}", match.groupdict().get("i") or "") + (match["leaf"] or "")


def strip_prefix(entries: StateDict, prefix: str) -> StateDict:
    """The entries below ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def add_prefix(entries: StateDict, prefix: str) -> StateDict:
    return {prefix + name: value for name, value in entries.items()}


def is_state_dict(value: object) -> TypeGuard[StateDict]:
    """Whether ``value`` is a non-empty dict of tensors by name."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
