"""Keys that configs had once, so that files and checkpoints from then can still be read."""

from __future__ import annotations

import logging
from typing import Any

from dinoengine.utils.logger import log_first_n

# Old key -> the key that has its meaning and its values now.
RENAMED: dict[str, str] = {
    "TEST.LOGREG.MAX_ITER": "TEST.LOGREG.MAX_LBFGS_ITERS",
    "TEST.SEGMENTATION.SCALE": "TEST.SEGMENTATION.RESIZE_RATIO",
}
# Old key, whose value means nothing now and may be passed over (no result depends on it) -> what takes its place.
REPLACED: dict[str, str] = {
    "TEST.KNN.CHUNK_SIZE": "TEST.KNN.MEMORY_MIB",
    "TEST.DENSE_KNN.CHUNK_SIZE": "TEST.DENSE_KNN.MEMORY_MIB",
}


def with_current_keys(values: list[tuple[str, Any]], where: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Values of a file or checkpoint under the names that keys have now; says what was translated.

    Args:
        values: (key, value) pairs; those with current names stay as they are.
        where: they come from, for messages.

    Returns:
        The pairs, and a problem for each old key beside its successor: one of the two has to go.
    """
    given = {key for key, _ in values}
    current: list[tuple[str, Any]] = []
    problems: list[str] = []
    for key, value in values:
        if key in RENAMED and RENAMED[key] in given:
            problems.append(f"{key} is now {RENAMED[key]}, which is given as well; remove {key}.")
        elif key in RENAMED:
            _say(f"{where}: {key} is now {RENAMED[key]}; its value {value!r} is taken.")
            current.append((RENAMED[key], value))
        elif key in REPLACED:
            _say(f"{where}: {key} {value!r} is passed over, as no result depends on it; now there is {REPLACED[key]}.")
        else:
            current.append((key, value))
    return current, problems


def successor(key: str) -> str:
    """The key that took the place of ``key``; empty if ``key`` never was one."""
    return RENAMED.get(key) or REPLACED.get(key, "")


def _say(message: str) -> None:
    log_first_n(logging.WARNING, message, name=__name__)  # a file is read several times in a run
