"""A hook from functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dinoengine.engine.train_loop import HookBase

Callback = Callable[[Any], None]


class CallbackHook(HookBase):
    """Each argument is a function of the trainer, called at the point it is named after."""

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_backward: Callback | None = None,
        before_optimizer_step: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        self._callbacks = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_backward": after_backward,
            "before_optimizer_step": before_optimizer_step,
            "after_step": after_step,
        }
        self.sees_weights_before_step = before_optimizer_step is not None

    def _call(self, point: str) -> None:
        callback = self._callbacks[point]
        if callback is not None:
            callback(self.trainer)

    def before_train(self) -> None:
        self._call("before_train")

    def after_train(self) -> None:
        self._call("after_train")

    def before_step(self) -> None:
        self._call("before_step")

    def after_backward(self) -> None:
        self._call("after_backward")

    def before_optimizer_step(self) -> None:
        self._call("before_optimizer_step")

    def after_step(self) -> None:
        self._call("after_step")
