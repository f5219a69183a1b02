"""Save, load, resume. One file per checkpoint, ``last_checkpoint`` names the newest.

A file is ``{"model": state dict, <name>: state of each checkpointable ..., "iteration": last finished iteration, "digest":
SHA-256 of all that}``. It is written to a temporary name, flushed and renamed, and the pointer is moved after it: a crash at any moment leaves the
last good checkpoint in place. Files are read with ``weights_only``: they are data and never run code.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import nn

from dinoengine.checkpoint.adopt import (
    adopt,
    fresh_mask_tokens,
    hints_of_model,
    log_adopted,
    require_entries,
    required,
    trains_with_masks,
)
from dinoengine.checkpoint.digest import content_digest
from dinoengine.checkpoint.files import (
    DIGEST,
    CheckpointError,
    UnreadableCheckpointError,
    grouped_names,
    read_checkpoint,
    read_content,
    short_list,
)
from dinoengine.checkpoint.layouts import detect_layout
from dinoengine.checkpoint.layouts.layout import is_state_dict
from dinoengine.utils import comm
from dinoengine.utils.file_io import atomic_write

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"


class Checkpointable(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Checkpointer:
    """Saves a model and whatever has a ``state_dict``; only rank 0 writes, every rank reads."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        strict: bool = True,
        metadata: dict[str, Any] | None = None,
        **checkpointables: Checkpointable,
    ) -> None:
        """
        Args:
            model: not wrapped in DDP.
            save_dir: where files go and where resuming looks.
            strict: whether loading weights requires every key to match (see ``load``).
            metadata: plain values stored in every file (the config as text).
            checkpointables: named objects with state, e.g. ``trainer=``.
        """
        self.model = model
        self.save_dir = save_dir
        self.strict = strict
        self.metadata = metadata or {}
        self.checkpointables = checkpointables

    def save(self, name: str, *, tag_last: bool = True, **extra: Any) -> str:
        """Write ``<save_dir>/<name>.pth`` and return its path.

        Args:
            tag_last: make it the checkpoint that ``resume`` continues from.
            extra: plain values stored beside, e.g. ``iteration=``.
        """
        path = os.path.join(self.save_dir, f"{name}.pth")
        if not comm.is_main_process():
            return path
        data = {
            "model": self.model.state_dict(),
            **{key: value.state_dict() for key, value in self.checkpointables.items()},
            **self.metadata,
            **extra,
        }
        os.makedirs(self.save_dir, exist_ok=True)
        data[DIGEST] = content_digest(data)
        with atomic_write(path) as file:
            torch.save(data, file)
        if tag_last:
            self.tag_last_checkpoint(f"{name}.pth")
        logger.info("Saved checkpoint %s", path)
        return path

    def tag_last_checkpoint(self, basename: str) -> None:
        """Point ``last_checkpoint`` at a file of ``save_dir``."""
        with atomic_write(os.path.join(self.save_dir, POINTER), "w") as file:
            file.write(basename)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return os.path.exists(os.path.join(self.save_dir, POINTER))

    def last_checkpoint_name(self) -> str:
        """What ``last_checkpoint`` names, or an empty string."""
        if not self.has_checkpoint():
            return ""
        with open(os.path.join(self.save_dir, POINTER), encoding="utf-8") as file:
            return os.path.basename(file.read().strip())

    def get_checkpoint_file(self) -> str:
        """Path of the checkpoint to resume from, or an empty string.

        Raises:
            CheckpointError: if the pointer names a file that is gone.
        """
        if not self.has_checkpoint():
            return ""
        path = os.path.join(self.save_dir, self.last_checkpoint_name())
        if not os.path.isfile(path):
            raise CheckpointError(
                f"{os.path.join(self.save_dir, POINTER)} names {os.path.basename(path)}, which is not there. Write the "
                f"name of another checkpoint of {self.save_dir} into it, or remove it to start over."
            )
        return path

    def resume_or_load(self, weights: str, *, resume: bool = True) -> int:
        """Continue the run in ``save_dir``, or start from ``weights``, or from scratch; logs which and why.

        Returns:
            The iteration to start from: last finished + 1 when resuming, else 0.
        """
        last = self.get_checkpoint_file() if resume else ""
        if last:
            reason = f"; MODEL.WEIGHTS {weights} is not used" if weights else ""
            logger.info("Resuming from %s (--resume, and it is the last checkpoint of this run%s).", last, reason)
            return int(self._load_last(last)["iteration"]) + 1
        why = f"; --resume found no checkpoint in {self.save_dir}" if resume else ""
        if weights:
            logger.info("Starting at iteration 0 with the weights of %s (MODEL.WEIGHTS%s).", weights, why)
            self.load_weights(weights, for_training=True)
        else:
            logger.info("Starting from scratch at iteration 0 (MODEL.WEIGHTS is empty%s).", why)
        return 0

    def _load_last(self, path: str) -> dict[str, Any]:
        try:
            return self.load(path)
        except UnreadableCheckpointError as error:
            others = [os.path.basename(p) for p in periodic_checkpoints(self.save_dir).values() if p != path]
            if not others:
                raise
            raise UnreadableCheckpointError(
                f"{error}\nTo go on from an earlier one, write its name into {os.path.join(self.save_dir, POINTER)}; there "
                f"are {short_list(others[::-1])}."
            ) from None

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
        content = read_content(path)
        own = self.model.state_dict()
        saved = content.data.get("model")
        if is_state_dict(saved) and _is_of_this_model(saved, own):
            self._load_model(saved, path, strict=self.strict, may_be_partial=True)
            logger.info("%s: layout dinoengine, a checkpoint of this model.", path)
            return
        weights = detect_layout(content).read(content, hints_of_model(self.model))
        adopted = adopt(weights, own)
        if self.strict:
            require_entries(weights, adopted, path)
        log_adopted(weights, adopted, path)
        # Parts that the file does not have keep the values they have; that is no fit, and nothing to complain of.
        kept = own.keys() - adopted.state.keys() - set(required(adopted.missing))
        self._load_model(adopted.state, path, strict=self.strict, may_be_partial=True, kept=kept)
        if for_training and trains_with_masks(self.model):
            self.model.load_state_dict(fresh_mask_tokens(adopted.state, own, path), strict=False)

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
        data = read_checkpoint(path)
        if "model" not in data:
            raise CheckpointError(
                f"{path} has no 'model' entry; it has {short_list(list(data))}. Expected a dinoengine checkpoint."
            )
        if not weights_only:
            missing = [name for name in self.checkpointables if name not in data]
            if missing:
                raise CheckpointError(
                    f"{path} cannot be resumed from: it lacks the state of {', '.join(missing)} (it has "
                    f"{short_list(list(data))}). To start a new run from its weights use MODEL.WEIGHTS without --resume."
                )
        # A resumed run is the run it was: there is nothing to leave out.
        self._load_model(data.pop("model"), path, strict=self.strict or not weights_only, may_be_partial=weights_only)
        if not weights_only:
            for name, checkpointable in self.checkpointables.items():
                checkpointable.load_state_dict(data.pop(name))
        return data

    def _load_model(
        self,
        saved: dict[str, torch.Tensor],
        path: str,
        *,
        strict: bool,
        may_be_partial: bool,
        kept: Collection[str] = (),
    ) -> None:
        """``kept``: entries of the model that ``saved`` need not have."""
        own = self.model.state_dict()
        missing = [key for key in own if key not in saved and key not in kept]
        unexpected = [key for key in saved if key not in own]
        misshapen = [key for key in own if key in saved and saved[key].shape != own[key].shape]
        problems = []
        if misshapen:
            shapes = [f"{k} {list(saved[k].shape)} (model: {list(own[k].shape)})" for k in misshapen]
            problems.append(f"{len(misshapen)} of another shape: {short_list(shapes)}")
        if missing:
            problems.append(f"{len(missing)} missing: {short_list(grouped_names(missing))}")
        if unexpected:
            problems.append(f"{len(unexpected)} not in the model: {short_list(grouped_names(unexpected))}")
        num_fitting = sum(key in saved for key in own) - len(misshapen)
        report = f"{path} does not fit the model ({num_fitting} of {len(own)} entries fit):\n  " + "\n  ".join(problems)
        if (problems and strict) or num_fitting == 0:
            advice = "Use the config it was trained with (config.yaml beside it)"
            advice += ", or set MODEL.WEIGHTS_STRICT False to load only what fits." if may_be_partial else "."
            raise CheckpointError(f"{report}\n{advice}")
        if problems:
            logger.warning("%s\nLoading what fits, as MODEL.WEIGHTS_STRICT is False.", report)
        fitting = {key: saved[key] for key in own if key in saved and key not in misshapen}
        self.model.load_state_dict(fitting, strict=False)


def _is_of_this_model(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> bool:
    """Whether the names are this model's; a teacher alone is not a model with a student."""
    needs_student = any(name.startswith("student.") for name in own)
    has_student = any(name.startswith("student.") for name in saved)
    return bool(saved.keys() & own.keys()) and (has_student or not needs_student)


def periodic_checkpoints(save_dir: str) -> dict[int, str]:
    """Iteration -> path of the ``model_<iteration>.pth`` files of a folder, in order of the iteration."""
    found = {int(m[1]): m[0] for name in os.listdir(save_dir) if (m := re.fullmatch(r"model_(\d{7,})\.pth", name))}
    return {iteration: os.path.join(save_dir, found[iteration]) for iteration in sorted(found)}
