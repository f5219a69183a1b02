"""``@configurable``: call a class with a config, or with its plain arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode as _YacsCfgNode


def configurable(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate ``__init__`` of a class that has ``from_config(cls, cfg, ...) -> dict`` of its arguments.

        class Model:
            @configurable
            def __init__(self, width: int): ...

            @classmethod
            def from_config(cls, cfg):
                return {"width": cfg.MODEL.WIDTH}

        Model(cfg); Model(cfg, width=3); Model(width=3)

    With a config as first argument (or ``cfg=``), ``from_config`` gives the arguments; explicit ones win, and those
    ``from_config`` names in its own signature are passed to it.

    Raises:
        TypeError: if ``from_config`` is missing or is no classmethod, or for wrong arguments.
    """
    if init.__name__ != "__init__":
        raise TypeError(f"@configurable decorates __init__; got {init.__name__}.")

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _called_with_config(args, kwargs):
            init(self, *args, **kwargs)
            return
        from_config = getattr(type(self), "from_config", None)
        if not inspect.ismethod(from_config):
            raise TypeError(
                f"{type(self).__name__} needs a classmethod from_config(cls, cfg) to be called with a config."
            )
        init(self, **_arguments(from_config, args, kwargs))

    return wrapped


def _called_with_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args and isinstance(args[0], _YacsCfgNode)) or isinstance(kwargs.get("cfg"), _YacsCfgNode)


def _arguments(
    from_config: Callable[..., dict[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"The first argument of {from_config.__qualname__} must be named cfg.")
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return from_config(*args, **kwargs)
    overrides = {name: kwargs.pop(name) for name in set(kwargs) - set(parameters)}
    return {**from_config(*args, **kwargs), **overrides}
