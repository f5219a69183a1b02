"""Notices when training has collapsed, says how, and does what was asked for."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from dinoengine.checkpoint import Checkpointer, CheckpointError, periodic_checkpoints, read_checkpoint
from dinoengine.checkpoint.resuming import BEST, FINAL, checkpoint_name, endings_of
from dinoengine.checkpoint.sharded import rename_checkpoint
from dinoengine.engine.hooks.collapse_symptoms import (
    ADVICE,
    FEWEST_IMAGES,
    STEP_KINDS,
    TEST_KINDS,
    Scales,
    evaluation_symptoms,
    last_evaluation,
    step_symptoms,
)
from dinoengine.engine.train_loop import HookBase
from dinoengine.utils import comm
from dinoengine.utils.events import EventStorage

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "rollback")


class CollapseError(RuntimeError):
    """Training has collapsed, and the run was to end then."""


class CollapseGuard(HookBase):
    """Reads the metrics of a run: those of training every ``scales.window`` iterations, when they have just been read
    back anyway, and the results of the evaluator "label_free" when there are new ones.

    A symptom counts when it shows in ``patience`` readings in a row after the grace period. "warn" says so, once until it
    has gone. "stop" saves a checkpoint and ends the run with CollapseError. "rollback" makes ``last_checkpoint`` the last
    one before the symptom, gives later ones names that resuming and retention pass over, and ends the run as well: data
    and random numbers are functions of seed and iteration, so the same settings would collapse again from there.

    Metrics are the same on all processes, so all of them decide alike: register it on all, after the EvalHook.

    Readings are in the checkpoint, so a resumed run acts in the iteration in which the uninterrupted one would. They count
    anew with another action or patience, and after the guard itself has ended the run.
    """

    needs_state = False  # a run may get a guard when it is resumed

    def __init__(
        self,
        checkpointer: Checkpointer,
        scales: Scales,
        *,
        action: str = "warn",
        grace_iters: int = 0,
        patience: int = 5,
    ) -> None:
        """
        Args:
            action: one of ACTIONS.
            grace_iters: iterations at the start whose readings do not count.
            patience: readings in a row.

        Raises:
            ValueError: for another action.
        """
        if action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}; got {action!r}.")
        self.checkpointer = checkpointer
        self.scales = scales
        self.action = action
        self.grace_iters = grace_iters
        self.patience = patience
        self._num_in_a_row = dict.fromkeys((*STEP_KINDS, *TEST_KINDS), 0)
        self._last_healthy: dict[str, int] = {}
        self._last_reading = -1
        self._seen_evaluation = -1

    def before_train(self) -> None:
        if not self.scales.has_enough_images:
            logger.info(
                "The collapse guard does not judge the spread of features and the use of prototypes: a process has %d "
                "images at a time, and fewer than %d say too little.",
                self.scales.images_per_process,
                FEWEST_IMAGES,
            )
        if not self._last_healthy:  # nothing is known about the checkpoint it came from but that it may be healthy
            self._last_healthy = dict.fromkeys(self._num_in_a_row, self.trainer.start_iter - 1)
            self._last_reading = self.trainer.start_iter - 1
            self._seen_evaluation = last_evaluation(self.trainer.storage)

    def catch_up(self) -> None:
        # A checkpoint is written before the readings of its iteration.
        self.after_step()

    def after_step(self) -> None:
        storage, iteration = self.trainer.storage, self.trainer.iter
        found: dict[str, str] = {}
        if (iteration + 1) % self.scales.window == 0 and iteration != self._last_reading:
            self._last_reading = iteration
            found |= self._count(step_symptoms(storage, self.scales), STEP_KINDS)
        if (evaluated := last_evaluation(storage)) != self._seen_evaluation:
            self._seen_evaluation = evaluated
            found |= self._count(evaluation_symptoms(storage), TEST_KINDS)
        if found:
            self._act(found)

    def _count(self, symptoms: dict[str, str], kinds: tuple[str, ...]) -> dict[str, str]:
        """Takes in one reading; returns the symptoms whose patience has run out with it."""
        for kind in kinds:
            if kind not in symptoms:
                if self._num_in_a_row[kind] >= self.patience:
                    logger.info("Iteration %d: no longer %s.", self.trainer.iter, kind)
                self._num_in_a_row[kind] = 0
                self._last_healthy[kind] = self.trainer.iter
            elif self.trainer.iter + 1 > self.grace_iters:
                self._num_in_a_row[kind] += 1
        return {kind: what for kind, what in symptoms.items() if self._num_in_a_row[kind] == self.patience}

    def _act(self, found: dict[str, str]) -> None:
        lines = [
            f"{kind} ({what}) in {self.patience} readings in a row. Try: {ADVICE[kind]}."
            for kind, what in found.items()
        ]
        message = f"Training looks collapsed at iteration {self.trainer.iter}: " + "\n".join(lines)
        if self.action == "warn":
            logger.warning("%s\nTo end such a run set COLLAPSE_GUARD.ACTION stop or rollback.", message)
            return
        self._num_in_a_row = dict.fromkeys(self._num_in_a_row, 0)  # a run that goes on from here may get over it
        self.trainer.flush_metrics()
        try:  # the errors of both are those of all processes
            self.checkpointer.wait()
            end = self._stop() if self.action == "stop" else comm.on_main_process(lambda: self._roll_back(list(found)))
        except (OSError, ValueError) as error:  # is less than the collapse, which must be reported
            end = f"COLLAPSE_GUARD.ACTION {self.action} failed: {error}"
        raise CollapseError(f"{message}\n{end}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "patience": self.patience,
            "num_in_a_row": dict(self._num_in_a_row),
            "last_healthy": dict(self._last_healthy),
            "last_reading": self._last_reading,
            "seen_evaluation": self._seen_evaluation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["action"], state["patience"]) == (self.action, self.patience):
            self._num_in_a_row = dict(state["num_in_a_row"])
        self._last_healthy = dict(state["last_healthy"])
        self._last_reading = state["last_reading"]
        self._seen_evaluation = state["seen_evaluation"]

    def _stop(self) -> str:
        path = self.checkpointer.save(checkpoint_name(self.trainer.iter), required=True, iteration=self.trainer.iter)
        return f"The run was stopped (COLLAPSE_GUARD.ACTION stop) and saved in {path}."

    def _roll_back(self, kinds: list[str]) -> str:
        """Find the checkpoint and move the later ones out of the way; returns what is to be said."""
        folder = self.checkpointer.save_dir
        checkpoints = self._checkpoints(folder)
        healthy = ((i, path) for i, path in reversed(checkpoints) if self._is_healthy(i, path, kinds))
        last, last_path = next(healthy, (-1, ""))
        if not last_path:
            return (
                "There is no checkpoint from before it (COLLAPSE_GUARD.ACTION rollback), so the files are left as they "
                "are: change one of these keys and start anew in another OUTPUT_DIR."
            )
        self.checkpointer.tag_last_checkpoint(os.path.basename(last_path))
        abandoned = [path for iteration, path in checkpoints if iteration > last]
        for path in (*abandoned, *self._best_after(last, folder)):
            rename_checkpoint(path, os.path.join(folder, os.path.basename(path).replace("model_", "collapsed_", 1)))
        return (
            f"last_checkpoint is now {os.path.basename(last_path)}, the last one before it; those after it (and "
            "model_best, if it is one) are called collapsed_*. With the same settings the run would collapse again from "
            "there, so it was ended. Go on with one of these keys changed (not those of a new run, which change what the "
            "checkpoint holds):\n"
            f"  python tools/train_net.py --config-file {folder}/config.yaml --resume KEY VALUE"
        )

    @staticmethod
    def _checkpoints(folder: str) -> list[tuple[float, str]]:
        """(iteration, path) of all that a run can be resumed from, oldest first."""
        checkpoints: list[tuple[float, str]] = []
        if os.path.isdir(folder):
            checkpoints += periodic_checkpoints(folder).items()
        finals = (os.path.join(folder, name) for name in endings_of(FINAL))
        checkpoints += [(_iteration_in(final), final) for final in finals if os.path.exists(final)]
        return sorted(checkpoints)

    @staticmethod
    def _best_after(iteration: float, folder: str) -> list[str]:
        """The files of the best checkpoint if it is of an iteration after this one: then it is no best to come up to."""
        bests, record = endings_of(os.path.join(folder, BEST)), os.path.join(folder, f"{BEST}.json")
        best = next((path for path in bests if os.path.exists(path)), "")
        if not best or _iteration_in(best) <= iteration:
            return []
        return [path for path in (record, best) if os.path.exists(path)]  # a best without its record is none

    def _is_healthy(self, iteration: float, path: str, kinds: list[str]) -> bool:
        """By what this run has seen, and by the metrics in the file itself, which may be older than this run."""
        if iteration > min(self._last_healthy[kind] for kind in kinds):
            return False
        storage = EventStorage()
        try:
            storage.load_state_dict(read_checkpoint(path)["trainer"]["storage"])
        except (CheckpointError, KeyError):
            return False
        symptoms = step_symptoms(storage, self.scales) | evaluation_symptoms(storage)
        return not any(kind in symptoms for kind in kinds)


def _iteration_in(path: str) -> float:
    """Last iteration of a checkpoint; infinity for one that cannot be read: it is none to go back to."""
    try:
        return float(read_checkpoint(path).get("iteration", math.inf))
    except CheckpointError as error:
        logger.warning("No checkpoint to go back to: %s", error)
        return math.inf
