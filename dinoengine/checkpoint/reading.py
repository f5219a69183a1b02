"""Reading checkpoints in whatever they lie: a file, a folder of shards, a folder as Hugging Face writes it."""

from __future__ import annotations

import json
import os
from typing import Any

from dinoengine.checkpoint.files import (
    MOST_NAMES,
    CheckpointError,
    FileContent,
    first_line,
    read_file,
    read_safetensors,
)
from dinoengine.checkpoint.sharded import SUFFIX, read_sharded
from dinoengine.utils.file_io import local_path


def read_content(path: str) -> FileContent:
    """Read a ``.pth`` file, a ``.safetensors`` file, or a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, no checkpoint, or holds pickled code.
    """
    source, local = path, local_path(path)
    if os.path.isdir(local) and not _holds_shares(local):
        weights = os.path.join(local, "model.safetensors")
        if not os.path.isfile(weights):
            found = ", ".join(sorted(os.listdir(local))[:MOST_NAMES]) or "nothing"
            raise CheckpointError(
                f"The folder {path} has no model.safetensors (it has {found}). Give a weight file, or a folder as Hugging "
                "Face's save_pretrained writes it, in one file."
            )
        source = local = weights
    data = read_safetensors(source) if local.endswith(".safetensors") else read_checkpoint(path)
    return FileContent(path, data, _read_json(os.path.join(os.path.dirname(local), "config.json")))


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint, a file (see ``files.read_file``) or the folder of a sharded one, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableCheckpointError: if it is damaged, or holds pickled code.
        CheckpointError: if it is no checkpoint.
    """
    local = local_path(path)
    return read_sharded(local) if _holds_shares(local) else read_file(path)


def _holds_shares(path: str) -> bool:
    """Whether it is the folder of a sharded checkpoint, written to its end or not."""
    return os.path.isdir(path) and path.rstrip("/").endswith(SUFFIX)


def _read_json(path: str) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {first_line(error)}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content
