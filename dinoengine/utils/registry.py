"""Name -> object tables: how configs pick models, datasets, optimizers and evaluators."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from fvcore.common.registry import Registry as _FvcoreRegistry


class UnknownNameError(KeyError):
    """A KeyError whose message prints as written (KeyError shows the repr of its argument)."""

    def __str__(self) -> str:
        return str(self.args[0])


def suggest(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` when a known name is close to ``name``, else an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry(_FvcoreRegistry):
    """fvcore's registry, with explicit names and with errors that list what exists.

    Use as a decorator, ``@BACKBONE_REGISTRY.register()`` or ``.register("name")``, or directly,
    ``BACKBONE_REGISTRY.register("name", obj)``.
    """

    def register(self, name: Any = None, obj: Any = None) -> Any:
        """Register ``obj`` under ``name``; both optional, as a decorator or a call.

        Raises:
            ValueError: if the name is taken.
        """
        if callable(name) and obj is None:  # register(obj)
            name, obj = None, name
        if obj is not None:
            self._do_register(name or obj.__name__, obj)
            return obj

        def decorator(target: Callable[..., Any]) -> Callable[..., Any]:
            self._do_register(name or target.__name__, target)
            return target

        return decorator

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._obj_map)

    def get(self, name: str) -> Any:
        """The object registered under ``name``.

        Raises:
            UnknownNameError (a KeyError): if there is none; the message names the closest and lists all.
        """
        if name in self._obj_map:
            return self._obj_map[name]
        raise UnknownNameError(
            f"No {name!r} in the {self._name} registry{suggest(name, self.names())}. "
            f"Registered: {', '.join(self.names()) or 'nothing'}."
        )

    def _do_register(self, name: str, obj: Any) -> None:
        if name in self._obj_map:
            raise ValueError(
                f"{name!r} is already registered in the {self._name} registry "
                f"({self._obj_map[name]!r}); choose another name. Registered: {', '.join(self.names())}."
            )
        self._obj_map[name] = obj
