"""Reading a weight file of any origin. It is data: nothing in it is ever run."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import pickle
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.digest import content_digest
from dinoengine.utils.file_io import local_path
from dinoengine.utils.logger import log_first_n

StateDict = dict[str, Tensor]

DIGEST = "digest"

MOST_NAMES = 8
# What unpickling bytes that are no pickle may end in.
_DAMAGE = (EOFError, KeyError, AttributeError, IndexError, TypeError, AssertionError, struct.error)
_GRAPHS = (".onnx", ".pt2")
_ADVICE_ON_DAMAGE = "Use another copy of it, or an earlier checkpoint; a second damaged file hints at the disk."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; says which keys and what to do."""


class UnreadableCheckpointError(CheckpointError):
    """A file that is damaged or no checkpoint at all."""


@dataclass
class FileContent:
    """What lies in a file, or in a folder as Hugging Face writes it.

    Attributes:
        path: where it was read from, for messages.
        data: as stored: a state dict, or a dict that holds some.
        config: the ``config.json`` beside the file; None where there is none.
    """

    path: str
    data: dict[str, Any]
    config: dict[str, Any] | None = None


def read_file(path: str) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU. Only data is read, no pickled code.

    An ``argparse.Namespace``, in which trainings keep their arguments, is data: a dict by another name. The digest that a
    Checkpointer has put into the file is compared with its content, and left out.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableCheckpointError: if it is damaged, or holds pickled code.
        CheckpointError: if it is no checkpoint.
    """
    local = local_path(path)
    _require_file(local, path)
    if local.endswith(_GRAPHS):
        raise CheckpointError(
            f"{path} is an exported graph, which has no entries by name. Give the weights it was exported from."
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch's on pickles that are none of its own; what becomes of them is said here
            data = torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnreadableCheckpointError(
            f"{path} was refused: it is damaged or holds pickled Python objects, which could run code. Only tensors and "
            f"plain values are read. If you trust where it comes from, save its tensors alone, e.g. "
            f"torch.save(model.state_dict(), ...). ({_refused(error)})"
        ) from None
    except (*_DAMAGE, RuntimeError, ValueError, OSError) as error:
        if _is_of_the_machine(error):
            raise
        raise UnreadableCheckpointError(
            f"{path} cannot be read: damaged or no checkpoint ({first_line(error)}). {_ADVICE_ON_DAMAGE}"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a checkpoint, which is a dict.")
    _check_digest(data, path)
    return data


def _check_digest(data: dict[str, Any], path: str) -> None:
    """Take the digest out of ``data``. Values that changed on disk are still a valid file: nothing else would notice."""
    if not isinstance(data.get(DIGEST), str):
        # A run writes one into each of its own.
        level = logging.WARNING if "trainer" in data else logging.INFO
        log_first_n(level, f"{path} carries no digest (older, or not of a run): changed values go unnoticed.")
        return
    expected = data.pop(DIGEST)
    try:
        found = content_digest(data)
    except TypeError as error:
        found = str(error)
    if found != expected:
        raise UnreadableCheckpointError(
            f"{path} is damaged: its content is not what was written (another SHA-256). {_ADVICE_ON_DAMAGE}"
        )


def _is_of_the_machine(error: Exception) -> bool:
    """Whether reading failed for want of memory or by the file system: that says nothing of the file."""
    # A seek to a place that a damaged file names is EINVAL.
    by_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    return by_system or "allocate memory" in str(error)


def _require_file(local: str, path: str) -> None:
    if not os.path.isfile(local):
        raise FileNotFoundError(f"Checkpoint {path} does not exist. Check the path (MODEL.WEIGHTS in a config).")


def read_safetensors(path: str) -> StateDict:
    """The tensors of a ``.safetensors`` file, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableCheckpointError: if it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    local = local_path(path)
    _require_file(local, path)
    try:
        return load_file(local)
    except (SafetensorError, OSError) as error:
        raise UnreadableCheckpointError(
            f"{path} cannot be read: damaged or no safetensors ({first_line(error)})."
        ) from None


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a message."""
    if isinstance(error, _DAMAGE):
        return "no pickle"  # their texts are of the unpickler's bookkeeping
    text = (str(error).splitlines() or [""])[0].split(". ")[0]
    return text or type(error).__name__


def _refused(error: pickle.UnpicklingError) -> str:
    """Which object it was. The rest of torch's text explains how to load it all the same, which is no advice here."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"found: {found[1]}" if found else "no list of tensors can be read from it"


def grouped_names(keys: list[str]) -> list[str]:
    """``a.b.x, a.b.y`` -> ``a.b.{x, y}``."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        prefix, _, leaf = key.rpartition(".")
        groups.setdefault(prefix, []).append(leaf)
    top = groups.pop("", [])
    return top + [f"{p}.{{{', '.join(v)}}}" if len(v) > 1 else f"{p}.{v[0]}" for p, v in groups.items()]


def short_list(names: list[str]) -> str:
    """The first names and how many more there are."""
    more = f" ... and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
