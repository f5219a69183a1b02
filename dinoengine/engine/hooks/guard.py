"""What to do when loss or gradients are not finite."""

from __future__ import annotations

import logging
from typing import Any

from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase

logger = logging.getLogger(__name__)

# The scaler halves its scale at each overflow; after this many in a row it is not the scale that is wrong.
MAX_FP16_OVERFLOWS_IN_A_ROW = 40


class NonFiniteGuard(HookBase):
    """Skips up to ``max_skips`` optimizer steps whose loss or gradients are not finite, then lets the run stop.

    The trainer finds such a step on all ranks together before the optimizer runs. A skipped step leaves weights,
    moments and teacher as they were and counts as an iteration. Overflows of fp16 gradients are the scaler's daily
    work and do not count, unless they never end.
    """

    trainer: SimpleTrainer
    sees_weights_before_step = False

    def __init__(self, max_skips: int = 0) -> None:
        self.max_skips = max_skips
        self.num_skipped = 0
        self._overflows_in_a_row = 0

    def before_optimizer_step(self) -> None:
        trainer = self.trainer
        if trainer.step_is_finite:
            self._overflows_in_a_row = 0
            return
        if trainer.is_fp16_overflow:
            self._overflows_in_a_row += 1
            if self._overflows_in_a_row > MAX_FP16_OVERFLOWS_IN_A_ROW:
                raise FloatingPointError(
                    f"fp16 gradients overflowed in {self._overflows_in_a_row} iterations in a row, whatever the loss "
                    f"scale. {trainer.describe_non_finite()}"
                )
            return
        if self.num_skipped < self.max_skips:
            self.num_skipped += 1
            trainer.skip_optimizer_step = True
            logger.warning(
                "Skipping step %d of %d allowed. %s",
                self.num_skipped,
                self.max_skips,
                trainer.describe_non_finite(),
            )
        elif self.max_skips:
            trainer.why_not_skipped = f" All {self.num_skipped} steps that may be skipped have been."

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped, "overflows_in_a_row": self._overflows_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"]
        self._overflows_in_a_row = state.get("overflows_in_a_row", 0)  # not in older checkpoints
