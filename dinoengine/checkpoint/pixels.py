"""Weights with other pixels than those of their training: found in the config that a checkpoint holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dinoengine.checkpoint.layouts.own import BY_CONVERSION, ORIGIN
from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.config.pixels import PIXEL_KEYS
from dinoengine.config.resume_rules import Change, config_changes, values_of_text

logger = logging.getLogger(__name__)

Check = Callable[[dict[str, Any], str], None]


def pixel_changes(cfg: CfgNode, data: dict[str, Any]) -> list[Change]:
    """The keys of ``PIXEL_KEYS`` in which ``cfg`` differs from the run that a checkpoint is of.

    Args:
        data: content of a weight file; none are known of files without the config of a run, as others publish them.
    """
    text = data.get("config")
    if not isinstance(text, str) or data.get(ORIGIN) == BY_CONVERSION:
        return []
    try:
        values = values_of_text(text, "The config in the weights")
    except ConfigError:  # reading the weights says so
        return []
    return [change for change in config_changes(values, cfg, get_cfg()) if change.key in PIXEL_KEYS]


def require_same_pixels(cfg: CfgNode) -> Check:
    """For ``Checkpointer(before_weights=)`` of an evaluation.

    The function that is returned raises ConfigError, with the values to set: features of other pixels are poor, and nothing
    else would show why.
    """

    def check(data: dict[str, Any], path: str) -> None:
        if changes := pixel_changes(cfg, data):
            values = " ".join(f'{change.key} "{_plain(change.before)}"' for change in changes)
            raise ConfigError(
                f"{path} was trained with other pixels than this config gives it",
                [*map(_described, changes), f"Evaluate it as it was trained: {values}"],
            )

    return check


def warn_of_other_pixels(cfg: CfgNode) -> Check:
    """For ``Checkpointer(before_weights=)`` of a training, which may adapt weights to other pixels."""

    def check(data: dict[str, Any], path: str) -> None:
        if changes := pixel_changes(cfg, data):
            logger.warning(
                "OTHER PIXELS than those %s was trained with; the weights have to adapt to them. Its checkpoints will hold "
                "the new values. If that is not meant, set the old ones:\n  %s",
                path,
                "\n  ".join(map(_described, changes)),
            )

    return check


def _described(change: Change) -> str:
    return f"{change.key} is {_plain(change.now)}, the weights are of {_plain(change.before)}."


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
