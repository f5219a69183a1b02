"""Save, load, resume. One file per checkpoint, ``last_checkpoint`` names the newest.

A file is ``{"model": state dict, <name>: state of each checkpointable ..., "iteration": last finished iteration, "digest":
SHA-256 of all that}``. It is written to a temporary name, flushed and renamed, and the pointer is moved after it: a crash
at any moment leaves the last good checkpoint in place. Files are read with ``weights_only``: they are data and never run
code. A resume that finds the last one damaged or gone takes the newest before it that is good.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from dinoengine.checkpoint.files import CheckpointError, short_list
from dinoengine.checkpoint.fitting import load_into
from dinoengine.checkpoint.resuming import (
    POINTER,
    iteration_of,
    last_good_name,
    pointed_name,
    read_newest_readable,
    read_shares,
    remove_twin,
    resumable,
    set_aside,
    shown,
)
from dinoengine.checkpoint.sharded import SUFFIX, is_checkpoint, mesh_of, remove_unfinished, write_sharded
from dinoengine.checkpoint.start_weights import load_start_weights
from dinoengine.checkpoint.writing import (
    BackgroundWriter,
    CheckpointWriteError,
    explained_errors,
    follow_up,
    snapshot,
    write_file,
)
from dinoengine.utils import comm
from dinoengine.utils.file_writing import atomic_write, remove_stale_temporaries

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

ON_ERROR = ("stop", "continue")


class Checkpointable(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Checkpointer:
    """Saves a model and whatever has a ``state_dict``; only rank 0 writes, of a sharded model all do; every rank reads.

    Attributes:
        num_failed: checkpoints that could not be written and were done without.
        before_save: called on rank 0 before a file is written; what it raises ends the save, an OSError as if it came of
            writing.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        strict: bool = True,
        metadata: dict[str, Any] | None = None,
        on_error: str = "stop",
        before_load: Callable[[dict[str, Any], str], None] | None = None,
        before_weights: Callable[[dict[str, Any], str], None] | None = None,
        **checkpointables: Checkpointable,
    ) -> None:
        """
        Args:
            model: not wrapped in DDP.
            save_dir: where files go and where resuming looks.
            strict: whether loading weights requires every key to match (see ``load``).
            metadata: plain values stored in every file (the config as text).
            on_error: when a file cannot be written: "stop" raises, "continue" logs an error and goes on.
            before_load: called with content and path of a checkpoint to be resumed from; raises if it must not be.
            before_weights: the same for a file of any layout whose weights alone are to be loaded.
            checkpointables: named objects with state, e.g. ``trainer=``.

        Raises:
            ValueError: for another ``on_error``.
        """
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}; got {on_error!r}.")
        self.model = model
        self.save_dir = save_dir
        self.strict = strict
        self.metadata = metadata or {}
        self.checkpointables = checkpointables
        self.on_error = on_error
        self.num_failed = 0
        self._writer = BackgroundWriter()
        self.before_load = before_load
        self.before_save: Callable[[], None] | None = None
        self.before_weights = before_weights

    def save(
        self,
        name: str,
        *,
        tag_last: bool = True,
        required: bool = False,
        background: bool = False,
        then: Callable[[], None] | None = None,
        **extra: Any,
    ) -> str:
        """Write ``<save_dir>/<name>.pth``, of a sharded model the folder ``<name>.dcp``.

        A collective operation: an error is that of every rank.

        At most one file is being written: a save waits for the one before it.

        Args:
            tag_last: make it the checkpoint that ``resume`` continues from, once it is on disk.
            required: an error is raised whatever ``on_error`` says, as there is no later save.
            background: copy the state to CPU memory and return; a thread writes it. What goes wrong then comes out of the
                next ``save`` or ``wait``.
            then: called on rank 0 when the file is on disk and tagged, in the thread that wrote it. An OSError of it is a
                CheckpointWriteError that says so.
            extra: plain values stored beside, e.g. ``iteration=``.

        Returns:
            The path; empty if it was done without.

        Raises:
            CheckpointWriteError: if it, or the one before it, cannot be written; everything on disk is as it was. Also if
                ``then`` fails, with the file on disk.
            TypeError: if a state holds what could not be read back.
        """
        is_shared = self._mesh is not None
        path = os.path.join(self.save_dir, f"{name}{SUFFIX if is_shared else '.pth'}")

        def save() -> None:
            data = {
                "model": self.model.state_dict(),
                **{key: value.state_dict() for key, value in self.checkpointables.items()},
                **self.metadata,
                **extra,
            }
            if self.before_save is not None:
                with explained_errors(path, data, last_good_name(self.save_dir)):
                    if is_shared:
                        comm.on_main_process(self.before_save)
                    else:
                        self.before_save()
            if is_shared:
                self._write_together(path, data, tag_last, then)
            elif background:
                kept = snapshot(data)
                self._writer.start(lambda: self._write(path, kept, tag_last, then))
            else:
                self._write(path, data, tag_last, then)

        self.wait()
        together = save if is_shared else lambda: comm.on_main_process(save)
        return path if self._attempt(together, required=required) else ""

    def _attempt(self, write: Callable[[], None], *, required: bool = False) -> bool:
        """``write``, on all processes; whether it was done."""
        try:
            write()
        except CheckpointWriteError as error:
            if required or self.on_error == "stop":
                raise
            self.num_failed += 1
            logger.error(
                "%s\nGoing on without it, as SOLVER.CHECKPOINT_ON_ERROR is continue (%d so far).",
                error,
                self.num_failed,
            )
            return False
        return True

    def _write(self, path: str, data: dict[str, Any], tag_last: bool, then: Callable[[], None] | None) -> None:
        with explained_errors(path, data, last_good_name(self.save_dir)):
            write_file(path, data)
            self._tag(path, tag_last)
        follow_up(path, then)
        logger.info("Saved checkpoint %s", path)

    def _write_together(self, path: str, data: dict[str, Any], tag_last: bool, then: Callable[[], None] | None) -> None:
        with explained_errors(path, data, last_good_name(self.save_dir)):
            write_sharded(path, data)
            comm.on_main_process(lambda: self._tag(path, tag_last))
        comm.on_main_process(lambda: follow_up(path, then))
        logger.info("Saved checkpoint %s", path)

    def _tag(self, path: str, tag_last: bool) -> None:
        if tag_last:
            self.tag_last_checkpoint(os.path.basename(path))
        remove_twin(path)

    @property
    def _mesh(self) -> DeviceMesh | None:
        return mesh_of(self.model)

    def wait(self) -> None:
        """Until what is written in the background is on disk; a collective operation.

        Raises:
            CheckpointWriteError: if it could not be written and ``on_error`` is "stop".
        """
        self._attempt(lambda: comm.on_main_process(self._writer.finish))

    def settle(self) -> None:
        """Like ``wait``, but of this process alone, and an error is logged: for a run that ends with another error, after
        which the processes may stand in different iterations."""
        try:
            self._writer.finish()
        except Exception:
            logger.exception("The checkpoint that was written in the background is lost.")

    def tag_last_checkpoint(self, basename: str) -> None:
        """Point ``last_checkpoint`` at a file of ``save_dir``."""
        with atomic_write(os.path.join(self.save_dir, POINTER), "w") as file:
            file.write(basename)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, good or not."""
        return bool(resumable(self.save_dir))

    def last_checkpoint_name(self) -> str:
        """What ``last_checkpoint`` names, or an empty string."""
        return pointed_name(self.save_dir)

    def get_checkpoint_file(self) -> str:
        """Path of the last checkpoint, or an empty string.

        Raises:
            CheckpointError: if the pointer names a file that is gone.
        """
        names = resumable(self.save_dir)
        path = os.path.join(self.save_dir, names[0]) if names else ""
        if path and not is_checkpoint(path):
            raise CheckpointError(
                f"{os.path.join(self.save_dir, POINTER)} names {shown(names[0])}, which is not there. Write the "
                f"name of another checkpoint of {self.save_dir} into it."
            )
        return path

    def resume_or_load(self, weights: str, *, resume: bool = True) -> int:
        """Continue the run in ``save_dir``, or start from ``weights``, or from scratch; logs which and why.

        A resume takes the last checkpoint, or the newest before it that every process can read; then files that are
        damaged are renamed to ``damaged_*.pth``, so that neither retention nor a later resume counts on them. A collective
        operation. Remains of killed processes are removed first.

        Returns:
            The iteration to start from: last finished + 1 when resuming, else 0.

        Raises:
            UnreadableCheckpointError: if there are checkpoints to resume from and none is good.
            CheckpointError, FileNotFoundError: if what is to be loaded cannot be read or does not fit.
        """
        comm.on_main_process(self._clean_up)
        # Of rank 0: another process may look while rank 0 is further, or at a disk of its own.
        last, names = comm.broadcast_object((pointed_name(self.save_dir), resumable(self.save_dir)))
        if resume and names:
            return self._resume(last, names, f"; MODEL.WEIGHTS {weights} is not used" if weights else "")
        why = f"; --resume found no checkpoint in {self.save_dir}" if resume else ""
        if weights:
            logger.info("Starting at iteration 0 with the weights of %s (MODEL.WEIGHTS%s).", weights, why)
            self.load_weights(weights, for_training=True)
        else:
            logger.info("Starting from scratch at iteration 0 (MODEL.WEIGHTS is empty%s).", why)
        return 0

    def _clean_up(self) -> None:
        self._writer.finish()
        if not os.path.isdir(self.save_dir):
            return
        unfinished = remove_unfinished(self.save_dir, pointed_name(self.save_dir))
        if removed := remove_stale_temporaries(self.save_dir) + unfinished:
            logger.info("Removed what a killed process left in %s: %s.", self.save_dir, short_list(removed))

    def _resume(self, pointed: str, names: list[str], reason: str) -> int:
        found = read_newest_readable(self.save_dir, names, self._mesh)
        path = os.path.join(self.save_dir, found.name)
        if "iteration" not in found.data:
            raise CheckpointError(
                f"{path} cannot be resumed from: it says no iteration. To start a new run from its weights use "
                "MODEL.WEIGHTS without --resume."
            )
        start = int(found.data["iteration"]) + 1
        if iteration_of(found.name) not in (None, start - 1):
            logger.warning(
                "%s is of iteration %d: it was renamed, or another was copied over it. The run goes on from there.",
                path,
                start - 1,
            )
        if found.name == pointed:
            logger.info("Resuming from %s (--resume, and it is the last checkpoint of this run%s).", path, reason)
        else:
            problems = "\n  ".join(found.problems.values()) or f"{POINTER} is missing."
            last = iteration_of(names[0])
            again = "The iterations since" if last is None else f"{last + 1 - start} iteration(s)"
            logger.warning(
                "The last checkpoint of this run cannot be used:\n  %s\nResuming from the newest good one, %s%s. %s are "
                "done again, from iteration %d on.",
                problems,
                path,
                reason,
                again,
                start,
            )
        self._load_data(found.data, path)
        comm.on_main_process(lambda: self._set_aside(found.damaged, found.name))
        return start

    def _set_aside(self, damaged: list[str], good: str) -> None:
        if pointed_name(self.save_dir) != good:
            self.tag_last_checkpoint(good)
        set_aside(self.save_dir, damaged)

    def load_weights(self, path: str, *, for_training: bool = False) -> None:
        """Load the weights of a file of any layout (``layouts/``) into the model; the layout is said in the log.

        Where the file is a checkpoint of this model, every entry must match. From other files come the parts they have:
        both student and teacher take a backbone, heads keep their initial values where there are none.

        Args:
            for_training: give a mask token that was never trained a random value, and say so.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it cannot be read or does not fit the model: any difference if ``strict``, else only when
                nothing fits.
        """
        load_start_weights(
            self.model, path, strict=self.strict, for_training=for_training, before_load=self.before_weights
        )

    def load(self, path: str, *, weights_only: bool = False) -> dict[str, Any]:
        """Load a checkpoint of this model and, unless ``weights_only``, the state of every checkpointable.

        The model is unchanged if the file does not fit it.

        Returns:
            What else the file holds, e.g. ``{"iteration": 99}``.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it cannot be read, lacks the state of a checkpointable, or does not fit the model:
                any difference if ``strict``, else only when nothing fits.
        """
        self.settle()
        return self._load_data(read_shares(path, self._mesh), path, model_only=weights_only)

    def _load_data(self, data: dict[str, Any], path: str, *, model_only: bool = False) -> dict[str, Any]:
        """Takes the states out of ``data`` and returns the rest."""
        if "model" not in data:
            raise CheckpointError(
                f"{path} has no 'model' entry; it has {short_list(list(data))}. Expected a dinoengine checkpoint."
            )
        if not model_only:
            missing = [name for name in self.checkpointables if name not in data]
            if missing:
                raise CheckpointError(
                    f"{path} cannot be resumed from: it lacks the state of {', '.join(missing)} (it has "
                    f"{short_list(list(data))}). To start a new run from its weights use MODEL.WEIGHTS without --resume."
                )
            if self.before_load is not None:
                self.before_load(data, path)
        # A resumed run is the run it was: there is nothing to leave out.
        load_into(self.model, data.pop("model"), path, strict=self.strict or not model_only, may_be_partial=model_only)
        if not model_only:
            for name, checkpointable in self.checkpointables.items():
                checkpointable.load_state_dict(data.pop(name))
        return data
