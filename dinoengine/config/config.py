"""CfgNode: yacs with inheritance between files, forgiving types and errors that teach."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable
from typing import Any

import yaml
from yacs.config import CfgNode as _YacsCfgNode

from dinoengine.config.renamed import successor, with_current_keys
from dinoengine.utils.registry import suggest

BASE_KEY = "_BASE_"


class ConfigError(ValueError):
    """Something in a config file, an override or the combination of keys is wrong; lists every problem."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        lines = problems if len(problems) == 1 else [f"  {i}. {text}" for i, text in enumerate(problems, 1)]
        super().__init__(f"{where}: {lines[0]}" if len(problems) == 1 else "\n".join([f"{where}:", *lines]))


class CfgNode(_YacsCfgNode):
    """A yacs config whose keys are fixed by ``defaults.py``.

    - Files may name a parent: ``_BASE_: ../_base_/vits16.yaml`` (or a list, later ones win), relative to the file.
    - Types are converted where no information is lost: int -> float, "true" -> bool, list <-> tuple,
      one value -> a tuple of one, number -> str.
    - Keys that files and checkpoints of older versions have are translated, with a warning (``renamed.py``).
    - A file or a list of overrides is taken as a whole or not at all; the error names every problem in it.
    """

    def merge_from_file(self, path: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file and the files it names under ``_BASE_``.

        Raises:
            ConfigError: unknown keys, wrong types, another VERSION, missing or circular bases; names the file.
        """
        if allow_unsafe:
            raise ValueError("Config files are data: YAML that constructs Python objects is never loaded.")
        chain = _load_with_bases(path, ())
        trial = self.clone()
        trial.defrost()
        for node in (trial, self):  # an error in any file of the chain leaves this config as it was
            for file_path, values in chain:
                node._merge_values(values, f"Config file {file_path}")

    def merge_from_list(self, cfg_list: Iterable[Any]) -> None:
        """Merge overrides given as ``KEY VALUE`` pairs, ``KEY=VALUE`` words, or a mixture.

        Raises:
            ConfigError: as ``merge_from_file``, and for a key without a value or a flag among the overrides.
        """
        self._merge_values(_parse_overrides(list(cfg_list)), "Overrides")

    def merge_from_other_cfg(self, cfg_other: _YacsCfgNode) -> None:
        """Merge another config; the same rules as for a file."""
        self._merge_values(_current(cfg_other, "Config"), "Config")

    def _merge_values(self, values: list[tuple[str, Any]], where: str) -> None:
        problems: list[str] = []
        accepted: list[tuple[str, Any]] = []
        leaves = dict(_leaves(self))
        for key, value in values:
            if value in (None, {}) and any(k.startswith(f"{key}.") for k in leaves):
                continue  # a heading with nothing below it
            if key == "VERSION" and value != leaves.get("VERSION", value):
                problems.append(f"VERSION is {value!r}; this dinoengine reads VERSION {leaves['VERSION']}.")
            elif key not in leaves:
                problems.append(_unknown_key(key, value, list(leaves)))
            else:
                try:
                    if isinstance(value, _Word) and not isinstance(leaves[key], str):
                        value = _literal(value)
                    accepted.append((key, _convert(value, leaves[key], key)))
                except TypeError as error:
                    problems.append(str(error))
        if problems:
            raise ConfigError(where, problems)
        if self.is_frozen():
            raise AttributeError("This config is frozen: it was validated and is in use. Clone and defrost it first.")
        for key, value in accepted:
            *groups, leaf = key.split(".")
            node = self
            for group in groups:
                node = node[group]
            node[leaf] = value

    def dump(self, **kwargs: Any) -> str:
        """The config as YAML that loads back to the same config; tuples are written as lists."""
        return yaml.safe_dump(_to_plain(self), sort_keys=False, default_flow_style=None, width=110, **kwargs)


def key_origins(cfg: CfgNode, config_file: str = "", overrides: Iterable[Any] = ()) -> dict[str, str]:
    """What gave each key of ``cfg`` its value, when ``config_file`` and then ``overrides`` were merged into the defaults.

    Returns:
        Every key, in order, with the path of the file that set it last, "command line" or "default". A key that a file
        sets to its default value counts as set by that file.

    Raises:
        ConfigError: for a file or overrides that cannot be read; merge them first to have their content checked.
    """
    sources = _load_with_bases(config_file, ()) if config_file else []
    origins = {key: path for path, values in sources for key, _ in values}
    origins |= {key: "command line" for key, _ in _parse_overrides(list(overrides))}
    return {key: origins.get(key, "default") for key, _ in _leaves(cfg)}


def _load_with_bases(path: str, seen: tuple[str, ...]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(file, its keys and values) of a config and its bases, in the order they are to be merged."""
    path = os.path.abspath(os.path.expanduser(path))
    if path in seen:
        raise ConfigError(f"Config file {path}", [f"{BASE_KEY} goes in a circle: {' -> '.join([*seen, path])}"])
    if not os.path.isfile(path):
        named_by = f" (named by {BASE_KEY} in {seen[-1]})" if seen else ""
        raise ConfigError(f"Config file {path}", [f"there is no such file{named_by}."])
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ConfigError(f"Config file {path}", [f"not valid YAML: {error}"]) from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"Config file {path}", [f"expected a mapping of keys, got {type(values).__name__}."])
    bases = values.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"Config file {path}", [f"{BASE_KEY} must be a path or a list of paths, got {bases!r}."])
    chain: list[tuple[str, list[tuple[str, Any]]]] = []
    for base in bases:
        base = os.path.expanduser(base)
        chain += _load_with_bases(os.path.join(os.path.dirname(path), base), (*seen, path))
    return [*chain, (path, _current(values, f"Config file {path}"))]


def _current(values: dict[str, Any], where: str) -> list[tuple[str, Any]]:
    """Nested mappings as pairs, under the names that keys have now; ConfigError for an old name beside the new one."""
    pairs, problems = with_current_keys(flatten(values), where)
    if problems:
        raise ConfigError(where, problems)
    return pairs


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as ("A.B.C", value) pairs, in order; an empty mapping is a value."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat += flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def unflatten(values: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings from dotted keys: {"A.B": 1} -> {"A": {"B": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return nested


def _leaves(node: _YacsCfgNode) -> list[tuple[str, Any]]:
    return flatten(node)


class _Word(str):
    """A word of the command line: a text for a text key, else the literal it spells."""


def _parse_overrides(words: list[Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    problems: list[str] = []
    while words:
        word = words.pop(0)
        if not isinstance(word, str) or not word or word.startswith("-"):
            problems.append(f"expected a config key, got {word!r} (a flag this command does not have?).")
            continue
        key, equals, value = word.partition("=")
        if equals:
            pairs.append((key, _Word(value)))
        elif words and not (isinstance(words[0], str) and words[0].startswith("--")):
            value = words.pop(0)
            pairs.append((key, _Word(value) if isinstance(value, str) else value))
        else:
            problems.append(f"{key} has no value; write `{key} VALUE` or `{key}=VALUE`.")
    if problems:
        raise ConfigError("Overrides", problems)
    return pairs


def _literal(word: str) -> Any:
    """The Python literal that a command-line word spells, or the word itself."""
    try:
        value = ast.literal_eval(word)
        return str(word) if isinstance(value, dict) else value  # a dataset string in JSON form
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return str(word)


def _unknown_key(key: str, value: Any, known: list[str]) -> str:
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return f"{key} is a group of keys, not a key (got {value!r}); it has {', '.join(inside[:6])} ..."
    if now := successor(key):
        return f"there is no key {key!r} any more; it is {now!r} now (see docs/config.md)."
    # A right name in a wrong place is a commoner mistake than a misspelt one.
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    if 0 < len(same_leaf) <= 3:
        return f"there is no key {key!r} (did you mean {' or '.join(repr(k) for k in same_leaf)}?)."
    return f"there is no key {key!r}{suggest(key, known)}."


def _convert(value: Any, default: Any, key: str) -> Any:
    """``value`` as the type of ``default``, where that loses nothing; TypeError otherwise."""
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif isinstance(default, float):
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:  # YAML reads 1e-5 as a string, and "inf" is no literal
                return float(value)
            except (ValueError, OverflowError):
                pass
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, (float, str)):  # YAML reads 1e5 as a string
            try:
                if float(value).is_integer():
                    return int(float(value)) if not str(value).lstrip("+-").isdigit() else int(value)
            except (ValueError, OverflowError):
                pass
    elif isinstance(default, str):
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if value is None:
            return ""
    elif isinstance(default, tuple):
        if isinstance(value, (list, tuple, dict)):
            return _as_tuple([value] if isinstance(value, dict) else value)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return (value,) if value != "" else ()
    raise TypeError(f"{key} takes {_type_name(default)}, got {value!r} ({type(value).__name__}).")


def _as_tuple(value: Any) -> Any:
    if isinstance(value, dict):  # a mapping in a list of YAML: a dataset string in JSON form
        return json.dumps(value, ensure_ascii=False)
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _type_name(default: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        tuple: "a list of values",
    }
    return names[type(default)]


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(entry) for entry in value]
    return value
