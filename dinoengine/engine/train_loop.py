"""The training loop: iterations with hooks around them. See ``simple_trainer`` for what an iteration is."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from dinoengine.utils.events import EventStorage

logger = logging.getLogger(__name__)


class HookBase:
    """Base of everything that happens around an iteration. Override what you need.

    ``self.trainer`` (a weak reference, set at registration) gives ``iter``, ``max_iter``, ``storage``, ``model`` ...
    A hook with state implements ``state_dict`` and ``load_state_dict``; what it stores must load with
    ``torch.load(weights_only=True)``: plain numbers, strings, lists, dicts, tensors.

    Attributes:
        name: key of the hook's state in a checkpoint; unique among the stateful hooks of a trainer.
        runs_last: True for writers: they stay behind every hook, also behind those registered later.
        needs_state: False for a hook that may begin anew when a run is resumed from a checkpoint without its state.
        sees_weights_before_step: False for a hook whose ``before_optimizer_step``, in a step that is finite, neither looks
            at weights or moments nor asks to skip it. If all say so the optimizer runs before they do.
    """

    trainer: TrainerBase
    runs_last: bool = False
    needs_state: bool = True
    sees_weights_before_step: bool = True

    @property
    def name(self) -> str:
        return type(self).__name__

    def before_train(self) -> None:
        """Before the first iteration."""

    def after_train(self) -> None:
        """After the last one, also after an error; ``trainer.succeeded`` tells which."""

    def catch_up(self) -> None:
        """When a run is resumed, before its first iteration: what the last iteration of the checkpoint left undone.

        A checkpoint is written within ``after_step``, before the hooks behind it had their turn. ``trainer.iter`` is that
        of the iteration.
        """

    def before_step(self) -> None:
        """Before each iteration. Must be quick: it counts as training time."""

    def after_backward(self) -> None:
        """Gradients are complete and unscaled, not yet clipped."""

    def before_optimizer_step(self) -> None:
        """Gradients are clipped and checked; set ``trainer.skip_optimizer_step`` to leave the weights alone.

        See ``sees_weights_before_step``.
        """

    def after_flush(self) -> None:
        """Metrics of the last iterations have been brought together, on all ranks: for collectives that need not run at
        every step. Before ``after_step`` of the last of them."""

    def after_step(self) -> None:
        """After each iteration."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError(f"Hook {self.name} saves state but has no load_state_dict.")

    @property
    def is_stateful(self) -> bool:
        return type(self).state_dict is not HookBase.state_dict


class TrainerBase:
    """An iteration-based loop with hooks; it assumes nothing about model or data.

    Attributes:
        iter: index of the current iteration, from 0; in ``after_train`` of a run that succeeded or paused the number of
            iterations done, which is ``max_iter`` unless it was stopped.
        start_iter, max_iter: the range of this run.
        storage: the EventStorage of the run.
        succeeded: True once every iteration has run, or the run was stopped on request.
        stop_reason: why a hook asked to stop; empty: none has.
        pause_reason: why a hook asked to pause; empty: none has.
        paused: True once the run has ended for that reason, to be resumed; it has not succeeded.
        is_evaluating: True while a hook evaluates: weights and optimizer are not touched, and it may take long.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0
        self.max_iter = 0
        self.succeeded = False
        self.stop_reason = ""
        self.pause_reason = ""
        self.paused = False
        self.is_evaluating = False
        self._evaluation_was_left = False
        self.storage = EventStorage(0)

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks, in order; None entries are dropped. Hooks with ``runs_last`` stay behind all others.

        Raises:
            ValueError: if two stateful hooks have the same name.
        """
        taken = {h.name: None for h in self._hooks if h.is_stateful}  # in order
        for hook in hooks:
            if hook is None:
                continue
            if hook.is_stateful and hook.name in taken:
                raise ValueError(
                    f"Two hooks with state are named {hook.name!r}, so one would overwrite the other in a checkpoint. "
                    f"Give one another `name`. Stateful hooks so far: {', '.join(taken)}."
                )
            if hook.is_stateful:
                taken[hook.name] = None
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)
        self._hooks.sort(key=lambda h: h.runs_last)  # stable: keeps the order of registration otherwise

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations ``start_iter .. max_iter - 1``. With nothing left to do it says so and runs no hook."""
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        self.succeeded = self.paused = False
        self.stop_reason = self.pause_reason = ""
        self._evaluation_was_left = False
        if start_iter >= max_iter:
            self.succeeded = True
            logger.info("Nothing to train: iteration %d of %d is done already.", start_iter, max_iter)
            return
        logger.info("Training from iteration %d to %d.", start_iter, max_iter)
        self.storage.iter = start_iter
        with self.storage:
            error: BaseException | None = None
            try:
                self.before_train()
                self.catch_up()
                for self.iter in range(start_iter, max_iter):
                    if self._is_to_end(self.iter):
                        break
                    self.before_step()
                    self.run_step()
                    self.after_step()
                else:
                    self._is_to_end(max_iter)
                    self.iter = max_iter
                self.storage.iter = self.iter
                self.paused = bool(self.pause_reason)
                self.succeeded = not self.paused
            except Exception as e:
                # On the console the error speaks for itself, as it goes on from here; log.txt would not have its text.
                logger.error("Training stopped by an error in iteration %d (%s).", self.iter, type(e).__name__)
                logger.debug("The error: %s", e)
                error = e
                raise
            except BaseException as e:
                error = e
                raise
            finally:
                self.after_train(error)

    def _is_to_end(self, num_done: int) -> bool:
        if self.pause_reason:
            logger.info("Pausing after iteration %d of %d: %s", num_done, self.max_iter, self.pause_reason)
        elif self.stop_reason:
            logger.info("Stopping after iteration %d of %d: %s", num_done, self.max_iter, self.stop_reason)
        return bool(self.pause_reason or self.stop_reason)

    def request_stop(self, reason: str) -> None:
        """End the run well after this iteration: for a hook's ``after_step``, on all processes in the same iteration."""
        self.stop_reason = reason

    def request_pause(self, reason: str) -> None:
        """End the run after this iteration, saved to be resumed and not evaluated; else as ``request_stop``."""
        self.pause_reason = reason

    def leave_evaluation(self, reason: str) -> None:
        """Pause after an evaluation that was not finished.

        Hooks behind it have no turn in this iteration: processes that are still in the evaluation would not take part in
        their collectives. A resumed run catches up on them.
        """
        self.request_pause(reason)
        self._evaluation_was_left = True
        self.succeeded = False

    def run_step(self) -> None:
        """One iteration; subclasses define it."""
        raise NotImplementedError

    def flush_metrics(self) -> None:
        """Bring metrics that are still on their way into the storage; a collective operation."""

    def before_train(self) -> None:
        for hook in self._hooks:
            hook.before_train()

    def catch_up(self) -> None:
        """Let hooks do what the iteration of the checkpoint left undone; nothing in a run that starts at 0."""
        if self.start_iter == 0:
            return
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            hook.catch_up()
            if self._evaluation_was_left:
                break
        self.iter = self.storage.iter = self.start_iter

    def after_train(self, error: BaseException | None = None) -> None:
        """Every hook's ``after_train`` runs, whatever the others raise; the first error of all is the one reported."""
        first_error: Exception | None = None
        for name, finish in [*self.finishing(error), *((f"Hook {h.name}", h.after_train) for h in self._hooks)]:
            try:
                finish()
            except Exception as e:
                logger.exception("%s failed in after_train.", name)
                first_error = first_error or e
        if error is None and first_error is not None:
            raise first_error

    def finishing(self, error: BaseException | None) -> list[tuple[str, Callable[[], None]]]:
        """What a trainer itself does before the hooks' ``after_train``: (name for messages, function)."""
        return []

    def before_step(self) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        for hook in self._hooks:
            hook.after_backward()

    def before_optimizer_step(self) -> None:
        for hook in self._hooks:
            hook.before_optimizer_step()

    def after_step(self) -> None:
        for hook in self._hooks:
            hook.after_step()
            if self._evaluation_was_left:
                break

    def state_dict(self) -> dict[str, Any]:
        """Iteration, metric history and the state of every stateful hook under its name."""
        return {
            "iteration": self.iter,
            "storage": self.storage.state_dict(),
            "hooks": {h.name: h.state_dict() for h in self._hooks if h.is_stateful},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ValueError: if a part, or the state of a registered hook that needs it, is missing; names it.
        """
        require_parts(state, ("iteration", "storage", "hooks"))
        self.iter = state["iteration"]
        self.storage.load_state_dict(state["storage"])
        saved = dict(state["hooks"])
        for hook in self._hooks:
            if not hook.is_stateful:
                continue
            if hook.name not in saved and not hook.needs_state:
                logger.info("The checkpoint has no state for hook %s, which begins anew.", hook.name)
                continue
            if hook.name not in saved:
                raise ValueError(
                    f"The checkpoint has no state for hook {hook.name!r}; it has: {', '.join(saved) or 'none'}. "
                    "Resume with the hooks the run had, or start a new run from its weights with MODEL.WEIGHTS."
                )
            hook.load_state_dict(saved.pop(hook.name))
        if saved:
            logger.warning("The checkpoint has state of hooks this run does not have: %s.", ", ".join(saved))


def require_parts(state: dict[str, Any], names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: if a trainer's state lacks one of ``names``; says which, and what to do.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"The checkpoint cannot be resumed from: of the trainer's state it lacks {', '.join(missing)} (it has "
            f"{', '.join(state) or 'nothing'}). Resume from another checkpoint, or start a new run from its weights with "
            "MODEL.WEIGHTS and without --resume."
        )
