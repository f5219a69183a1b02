"""The grammar of dataset strings: text -> name and arguments. docs/data.md explains it to users."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args, get_type_hints

from dinoengine.utils.registry import suggest

GRAMMAR = (
    "name[:argument][:key=value]..., e.g. folder:/path/to/images or digits:split=train; a value with a colon or an equal "
    'sign in double quotes, folder:"/my: path", or all of it as JSON, {"name": "folder", "root": "/my: path"}'
)
_KEY = re.compile(r"[A-Za-z_]\w*")
# The colons of a protocol and of a port belong to the value.
_URL_START = re.compile(r"[A-Za-z][\w+.-]*://([^:/]*:\d+(?=[:/]|$))?")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPE = re.compile(r'\\(["\\])')


class DatasetString(NamedTuple):
    """What a string says before it is known what the dataset takes.

    Attributes:
        name: of the dataset.
        parts: what stands between colons, in order.
        values: of a string in JSON form, by key; None for one with colons.
    """

    name: str
    parts: tuple[Part, ...] = ()
    values: Mapping[str, Any] | None = None


class Part(NamedTuple):
    """Text between two colons: ``key=value`` if ``key`` is not None, where ``text`` is how it was written."""

    text: str
    key: str | None
    value: str
    quoted: bool


def parse(text: str) -> DatasetString:
    """
    Raises:
        ValueError: for a quote that is not closed, text behind a closing quote, or JSON that is no object with a name.
    """
    if text.lstrip().startswith("{"):
        return _parse_json(text)
    name, colon, rest = text.partition(":")
    parts = []
    while colon:
        part, colon, rest = _next_part(text, rest)
        parts.append(part)
    return DatasetString(name, tuple(parts))


def arguments_for(text: str, builder: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments that a string gives to the class or function it names.

    Keys are recognised from the right, and only if the dataset has such a parameter, so the argument may itself have ``:``
    and ``=`` in it without quotes. A builder with ``**options`` gets every key that it does not name, as text (or, of the
    JSON form, as it is).

    Raises:
        ValueError: if the string does not fit the grammar or the parameters; shows the part, the keys and the grammar.
    """
    parsed, parameters = parse(text), _Parameters(builder)
    if parsed.values is None:
        arguments = _from_parts(text, parsed.parts, parameters)
    else:
        for key in parsed.values:
            if not parameters.takes(key):
                raise parameters.not_understood(text, key, key)
        arguments = {key: parameters.typed(text, key, value) for key, value in parsed.values.items()}
    # An empty text for what must be given, a path above all, would mean the current folder to the file system.
    if missing := [name for name in parameters.required if arguments.get(name, "") == ""]:
        raise ValueError(f"Dataset {text!r} needs {', '.join(missing)}. Grammar: {GRAMMAR}.")
    return arguments


def misspelt_key(text: str, builder: Callable[..., Any]) -> str:
    """A sentence for the error of a dataset whose free text, a path mostly, has ``key=value`` in it; else nothing."""
    parsed, parameters = parse(text), _Parameters(builder)
    for part in parsed.parts:
        if part.key is not None and not parameters.takes(part.key):
            known = list(parameters.named)
            return (
                f"{part.text!r} looks like a key, and {parsed.name}: has none of that name{suggest(part.key, known)}, so "
                f"it was taken for a part of {known[0]}. The keys of {parsed.name}: are {', '.join(known)}."
            )
    return ""


def converted(text: str, key: str, value: Any, kind: Any) -> Any:
    """A value as a parameter of type ``kind`` wants it; text is read as such, other values (of JSON) must be of the type.

    Raises:
        ValueError: if it is none; ``text`` and ``key`` are for the message.
    """
    kind = next((k for k in get_args(kind) if k is not type(None)), kind)  # `int | None` takes an int
    try:
        if kind is Any:
            return value
        if not isinstance(value, str):
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise ValueError
            return kind(value)
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise ValueError(
            f"Dataset {text!r}: {key} must be {kind.__name__}, got {value!r}. Grammar: {GRAMMAR}."
        ) from None


class _Parameters:
    """What a builder takes."""

    def __init__(self, builder: Callable[..., Any]) -> None:
        every = inspect.signature(builder).parameters
        self.open = any(p.kind is p.VAR_KEYWORD for p in every.values())
        self.named = {name: p for name, p in every.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        self.types = get_type_hints(builder.__init__ if inspect.isclass(builder) else builder)
        self.required = [name for name, p in self.named.items() if p.default is p.empty]

    def takes(self, key: str) -> bool:
        return key in self.named or self.open

    def typed(self, text: str, key: str, value: Any) -> Any:
        return converted(text, key, value, self.types.get(key, str)) if key in self.named else value

    def not_understood(self, text: str, part: str, key: str) -> ValueError:
        return ValueError(
            f"Dataset {text!r}: {part!r} is not understood{suggest(key, list(self.named))}. "
            f"Its keys: {', '.join(self.named) or 'none'}. Grammar: {GRAMMAR}."
        )


def _from_parts(text: str, parts: tuple[Part, ...], parameters: _Parameters) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    left = list(parts)
    while left and left[-1].key is not None and parameters.takes(left[-1].key):
        part = left.pop()
        assert part.key is not None
        if part.key in arguments:
            raise ValueError(f"Dataset {text!r} gives {part.key!r} twice. Grammar: {GRAMMAR}.")
        arguments[part.key] = parameters.typed(text, part.key, part.value)
    argument = left[0].value if len(left) == 1 and left[0].quoted else ":".join(part.text for part in left)
    if not left or (not argument and not left[0].quoted):
        return arguments
    first = next(iter(parameters.named), None)
    # A parameter without default (folder's root) takes free text; others must be named, so typos are seen.
    if first is None or first in arguments or parameters.named[first].default not in (inspect.Parameter.empty, ""):
        raise parameters.not_understood(text, argument, left[-1].text.partition("=")[0])
    if len(left) > 1 and any(part.quoted for part in left):
        wrong = next(part for part in left if part.quoted)
        where = left.index(wrong) + 1 if wrong is left[0] else left.index(wrong)
        raise parameters.not_understood(text, left[where].text, left[where].text.partition("=")[0])
    arguments[first] = parameters.typed(text, first, argument)
    return arguments


def _next_part(text: str, rest: str) -> tuple[Part, str, str]:
    """(the first part of ``rest``, the colon behind it if there is one, what follows)."""
    key = _KEY.match(rest)
    start = key.end() + 1 if key and rest[key.end() : key.end() + 1] == "=" else 0
    name = rest[: start - 1] if start else None
    if rest[start : start + 1] != '"':
        url = _URL_START.match(rest, start)
        end = rest.find(":", url.end() if url else start)
        written, colon, after = (rest, "", "") if end < 0 else (rest[:end], ":", rest[end + 1 :])
        return Part(written, name, written[start:], False), colon, after
    quoted = _QUOTED.match(rest, start)
    if quoted is None:
        raise ValueError(
            f'Dataset {text!r}: the quote of {rest[start:]!r} is not closed. In quotes \\" is a quote and \\\\ a '
            f"backslash. Grammar: {GRAMMAR}."
        )
    after = rest[quoted.end() :]
    if after and not after.startswith(":"):
        raise ValueError(f"Dataset {text!r}: {after!r} follows a closing quote; expected ':'. Grammar: {GRAMMAR}.")
    value = _ESCAPE.sub(r"\1", quoted.group(1))
    return Part(rest[: quoted.end()], name, value, True), after[:1], after[1:]


def _parse_json(text: str) -> DatasetString:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"Dataset {text!r} begins as JSON and is none: {error}. Grammar: {GRAMMAR}.") from None
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'Dataset {text!r}: the JSON form needs "name", a text. Grammar: {GRAMMAR}.')
    return DatasetString(name, values=values)
