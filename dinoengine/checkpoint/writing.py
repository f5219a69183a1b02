"""How a checkpoint gets onto the disk, what is said when it does not, and the thread that writes beside the training."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.digest import content_digest
from dinoengine.checkpoint.files import DIGEST
from dinoengine.utils.file_writing import atomic_write

_MIB = 2**20


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written. Those before it are untouched."""


def write_file(path: str, data: dict[str, Any]) -> None:
    """Write ``data`` and its digest to a temporary name, flush, rename; makes the folder."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path) as file:
        torch.save({**data, DIGEST: content_digest(data)}, file)


@contextlib.contextmanager
def explained_errors(path: str, data: dict[str, Any], last_good: str) -> Iterator[None]:
    """Makes an OSError of the block, or an error that torch made of one, a CheckpointWriteError.

    Args:
        last_good: the checkpoint that a resumed run would continue from; empty: there is none.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None:
            raise
        raise CheckpointWriteError(_explanation(path, cause, num_bytes(data), last_good)) from error


def follow_up(path: str, work: Callable[[], None] | None) -> None:
    """What is to be done once a checkpoint is on disk; None: nothing.

    Raises:
        CheckpointWriteError: for an OSError of ``work``; says that the file is there.
    """
    if work is None:
        return
    try:
        work()
    except OSError as error:
        raise CheckpointWriteError(f"{path} is on disk, but what follows it failed: {error}.") from error


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """torch's writer raises a RuntimeError of its own while it deals with the OSError of the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _explanation(path: str, cause: OSError, needed: int, last_good: str) -> str:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.exists(folder) and not os.path.isdir(folder):
        return (
            f"{path} could not be written: {folder} is a file now, and must be a folder. Move it away, or choose another "
            "OUTPUT_DIR."
        )
    try:
        free = shutil.disk_usage(folder).free
        room = f"{folder} has {free / _MIB:,.1f} MiB free"
        if cause.errno in (errno.EDQUOT, errno.EFBIG):
            room += ", so a quota or a limit is in the way"
    except OSError as error:
        room = f"{folder} cannot be looked at ({error.strerror})"
    remedy = "Make room, or keep fewer files with SOLVER.CHECKPOINT_MAX_TO_KEEP"
    if cause.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
        remedy = "Give yourself the right to write there"
    continues = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint before it"
    return (
        f"{path} could not be written: {cause.strerror or cause}. It needs {needed / _MIB:,.1f} MiB and a little more; "
        f"{room}. Nothing that was there has changed: {continues}. {remedy}, then continue with --resume."
    )


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples, which is nearly what their file takes."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def snapshot(value: Any) -> Any:
    """A copy of nested dicts, lists, tuples and tensors in CPU memory that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(snapshot(item) for item in value)
    return value


class BackgroundWriter:
    """Runs one job at a time in a thread; what it raised comes out of the next ``finish``.

    The interpreter waits for the thread when it ends, so a process that ends normally loses nothing.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run ``job``; call ``finish`` before the next one."""
        assert self._thread is None, "the job before this one was not finished"
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the job.

        Raises:
            BaseException: what it raised; once.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # re-raised by ``finish`` in the thread that trains
            self._error = error
