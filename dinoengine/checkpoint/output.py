"""Where a tool may write, and how its result takes its place: written beside it, checked, then moved."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dinoengine.checkpoint.files import CheckpointError, short_list
from dinoengine.checkpoint.parity import Comparison

logger = logging.getLogger(__name__)

_OF_A_FOLDER = {"config.json", "model.safetensors"}


def require_free(target: str, overwrite: bool, source: str = "") -> None:
    """CheckpointError if ``target`` may not be replaced or cannot be written; makes its folder.

    Args:
        source: what is read, which is never replaced, nor the folder it lies in.
    """
    if os.path.exists(target) and not overwrite:
        raise CheckpointError(f"{target} exists already; choose another name, or give --overwrite.")
    if os.path.exists(target) and os.path.exists(source):
        if os.path.samefile(source, target):
            raise CheckpointError(f"IN and OUT are the same file {target}; write to another, so that the source stays.")
        if os.path.realpath(source).startswith(os.path.join(os.path.realpath(target), "")):
            raise CheckpointError(f"IN lies in OUT, the folder {target}; write to another, so that the source stays.")
    folder = os.path.dirname(os.path.abspath(target))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {folder} ({error.strerror}); choose another place."
        ) from None
    if os.path.isdir(target) and (foreign := set(os.listdir(target)) - _OF_A_FOLDER):
        raise CheckpointError(
            f"{target} is a folder with other files in it ({short_list(sorted(foreign))}), which would be lost; choose "
            "another name."
        )


@contextmanager
def checked_output(target: str, beside: Sequence[str] = ()) -> Iterator[str]:
    """Gives a path of the same name in a folder beside ``target``, for what is to be written and checked.

    When the block ends, everything in that folder moves to beside ``target``, ``target`` itself last. If the block
    raises, nothing is left of it and ``target`` is as it was.

    Args:
        beside: files that belong to ``target``; one that was not written anew is removed.
    """
    place, name = os.path.split(os.path.abspath(target))
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{name}.") as scratch:
        yield os.path.join(scratch, name)
        others = sorted(set(os.listdir(scratch)) - {name})
        stale = [path for path in beside if os.path.basename(path) not in others and os.path.exists(path)]
        if (others or stale) and os.path.isfile(target):
            os.remove(target)  # it would be read with files that are not its own
        for path in stale:
            os.remove(path)
        for other in others:
            os.replace(os.path.join(scratch, other), os.path.join(place, other))
        _take_place(os.path.join(scratch, name), target, os.path.join(scratch, "before"))


def _take_place(written: str, target: str, aside: str) -> None:
    """A folder cannot be replaced: the old one steps aside, and comes back if the new one cannot take its place."""
    is_folder = os.path.isdir(target)
    if is_folder:
        os.rename(target, aside)
    try:
        os.replace(written, target)
    except OSError:
        if is_folder:
            os.rename(aside, target)
        raise


def require_agreement(results: Sequence[Comparison], claim: str) -> None:
    """Log every comparison.

    Args:
        claim: what is wrong if one fails, e.g. "The result does not compute what the source does".

    Raises:
        CheckpointError: if one that must agree does not.
    """
    for result in results:
        logger.info("%s", result.line())
    if failed := [result.line() for result in results if result.must_agree and not result.agrees]:
        raise CheckpointError(f"{claim}, so nothing was written: {failed[0]}.")
