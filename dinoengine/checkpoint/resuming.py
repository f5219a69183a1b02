"""Which checkpoint a run continues from: the last one, or the newest before it that every process can read."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from dinoengine.checkpoint.files import CheckpointError, UnreadableCheckpointError
from dinoengine.checkpoint.reading import read_checkpoint
from dinoengine.checkpoint.sharded import (
    SUFFIX,
    is_checkpoint,
    is_sharded_checkpoint,
    read_sharded,
    remove_checkpoint,
    rename_checkpoint,
)
from dinoengine.utils import comm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

# Names of files in an OUTPUT_DIR; those of checkpoints without their ending, as ``Checkpointer.save`` takes them.
POINTER = "last_checkpoint"
FINAL = "model_final"
BEST = "model_best"
_LONGEST_NAME = 60
_CHECKPOINT = re.compile(r"model_.+\.(?:pth|dcp)")
_PERIODIC = re.compile(r"model_(\d{7,})\.(?:pth|dcp)")


class Readable(NamedTuple):
    """The checkpoint to continue from, and those that were tried before it.

    Attributes:
        data: its content.
        problems: name -> what is wrong with it, on the first process that has the problem.
        damaged: the names among them whose file is there and is damaged, as this process sees it.
    """

    name: str
    data: dict[str, Any]
    problems: dict[str, str]
    damaged: list[str]


def checkpoint_name(iteration: int) -> str:
    """Name of a periodic checkpoint, without ``.pth``; ``iteration`` is the last one that is done in it."""
    return f"model_{iteration:07d}"


def endings_of(name: str) -> list[str]:
    """What a checkpoint may be called on disk: ``name`` as a file and as a folder of shards."""
    return [name + ".pth", name + SUFFIX]


def final_checkpoint(output_dir: str) -> str:
    """Path of the last checkpoint of a finished run, a file or a folder of shares; empty if it is not finished."""
    return next(filter(is_checkpoint, endings_of(os.path.join(output_dir, FINAL))), "")


def remove_twin(path: str) -> None:
    """Remove the older checkpoint of the same name and the other kind, which a run has left that was or was not sharded.

    Else a ``model_final`` of long ago would stay beside the one just written. What cannot be removed stays, and is said.
    """
    for twin in endings_of(os.path.splitext(path)[0]):
        if twin != path and is_checkpoint(twin):
            try:
                remove_checkpoint(twin)
                logger.info("Removed %s, which was older than %s.", twin, os.path.basename(path))
            except OSError as error:
                logger.warning(
                    "%s is older than %s and could not be removed: %s. Remove it.", twin, path, error.strerror
                )


def iteration_of(name: str) -> int | None:
    """The iteration in the name of a periodic checkpoint; None for another name."""
    match = _PERIODIC.fullmatch(name)
    return int(match[1]) if match else None


def periodic_checkpoints(save_dir: str) -> dict[int, str]:
    """Iteration -> path of the ``model_<iteration>.pth`` files and ``.dcp`` folders of a folder, in order of the iteration.

    The file where there are both; a folder that was not written to its end is none.
    """
    names = [name for name in sorted(os.listdir(save_dir)) if _is_complete(os.path.join(save_dir, name))]
    found = {i: name for name in names if (i := iteration_of(name)) is not None}
    return {iteration: os.path.join(save_dir, found[iteration]) for iteration in sorted(found)}


def _is_complete(path: str) -> bool:
    return not path.endswith(SUFFIX) or is_sharded_checkpoint(path)


def pointer_text(save_dir: str) -> str:
    """What stands in ``last_checkpoint``, whatever it is; empty where there is none."""
    path = os.path.join(save_dir, POINTER)
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def pointed_name(save_dir: str) -> str:
    """What ``last_checkpoint`` names, or an empty string: a name in ``save_dir``, also where a path was written into it."""
    return os.path.basename(pointer_text(save_dir))


def last_good_name(save_dir: str) -> str:
    """What ``last_checkpoint`` names if it is there, or an empty string."""
    last = pointed_name(save_dir)
    return last if is_checkpoint(os.path.join(save_dir, last)) else ""


def set_aside(save_dir: str, damaged: list[str]) -> None:
    """Rename damaged checkpoints to ``damaged_*``, so that neither retention nor a later resume counts on them.

    A damaged pointer may name any file of the folder; what has not the name of a checkpoint stays, as does what is gone.
    """
    for name in damaged:
        path = os.path.join(save_dir, name)
        if _CHECKPOINT.fullmatch(name) and os.path.exists(path):
            rename_checkpoint(path, os.path.join(save_dir, f"damaged_{name.removeprefix('model_')}"))


def shown(name: str) -> str:
    """What a damaged ``last_checkpoint`` names, for messages: cut short and quoted unless it may be the name of a file."""
    is_name = len(name) <= _LONGEST_NAME and re.fullmatch(r"[\w.+-]+", name, re.ASCII)
    return name if is_name else ascii(name[:_LONGEST_NAME]) + ("..." if len(name) > _LONGEST_NAME else "")


def resumable(save_dir: str) -> list[str]:
    """Names of the checkpoints to try, in order: what ``last_checkpoint`` names, then the periodic ones before it.

    Periodic ones of a later iteration are of a run that went back behind them. Without a pointer (the process died
    between the first file and the pointer, or it was lost) all periodic ones count.
    """
    last = pointed_name(save_dir)
    periodic = periodic_checkpoints(save_dir) if os.path.isdir(save_dir) else {}
    end = iteration_of(last)
    earlier = [os.path.basename(path) for iteration, path in periodic.items() if end is None or iteration < end]
    return ([last] if last else []) + earlier[::-1]


def read_shares(path: str, mesh: DeviceMesh | None) -> dict[str, Any]:
    """``read_checkpoint``, but of a sharded checkpoint each process of ``mesh`` reads its share (``read_sharded``)."""
    return read_sharded(path, mesh) if mesh is not None and path.endswith(SUFFIX) else read_checkpoint(path)


def read_newest_readable(save_dir: str, names: list[str], mesh: DeviceMesh | None = None) -> Readable:
    """Read the first of ``names`` that every process can read; a collective operation.

    Args:
        mesh: as in ``read_shares``.

    Raises:
        UnreadableCheckpointError: if there is none; says what is wrong with each.
        CheckpointError: if a process has no memory for one, or its file system fails: the file may be good.
    """
    problems: dict[str, str] = {}
    damaged = []
    for name in names:
        data, problem, trouble = {}, "", ""
        try:
            data = read_shares(os.path.join(save_dir, name), mesh)
        except FileNotFoundError:
            problem = f"{shown(name)} is not there."
            if (text := pointer_text(save_dir)) != name == os.path.basename(text):
                problem = f"{POINTER} holds {shown(text)}, which is no name of a checkpoint."
        except CheckpointError as error:
            problem = str(error)
            damaged.append(name)
        except (OSError, MemoryError, RuntimeError) as error:
            trouble = f"{name}: {type(error).__name__}: {error}"
        troubles = [text for text in comm.all_gather(trouble) if text]
        if troubles:
            raise CheckpointError(
                f"A checkpoint of {save_dir} could not be read now, which says nothing of the file: {troubles[0]}. Nothing "
                f"has been changed. Start again; if the disk is broken, write the name of another file into {POINTER}."
            )
        seen = comm.all_gather(problem)
        if not any(seen):
            return Readable(name, data, problems, damaged)
        rank, problems[name] = next((rank, text) for rank, text in enumerate(seen) if text)
        if comm.is_distributed():
            problems[name] += f" (seen by rank {rank})"
    tried = "\n  ".join(problems.values())
    raise UnreadableCheckpointError(
        f"No checkpoint in {save_dir} can be resumed from; tried, newest first:\n  {tried}\nIf you have a good one, put it "
        f"there (on every machine, or on a file system that they share) and write its name into {POINTER}; else start over "
        "in another OUTPUT_DIR."
    )
