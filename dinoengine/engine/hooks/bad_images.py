"""Images that could not be used in training: counted, listed in a file, and too many of them end the run."""

from __future__ import annotations

import logging
import os
from typing import Any

from dinoengine.data import DataError
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.structures import BadImage
from dinoengine.utils import comm
from dinoengine.utils.file_writing import atomic_write
from dinoengine.utils.printable import printable

logger = logging.getLogger(__name__)

FILE_NAME = "bad_images.txt"
# Before that many a share says little: the second image of a good set of a million may be a bad one.
FEWEST_TO_JUDGE = 10
_MOST_UNWRITTEN = 10_000
_MOST_WARNINGS = 10

Event = tuple[int, BadImage]


class BadImageLog(HookBase):
    """Brings the images that ``data.TrainingStream`` replaced together from all ranks, whenever metrics are flushed.

    ``OUTPUT_DIR/bad_images.txt`` gets a line for each: iteration, position, path, cause, with tabs between them. A resumed
    run drops the lines of iterations that it repeats. The scalar ``bad_images`` is their number since the beginning. The
    counts are the same on all ranks, so all of them end in the same iteration. Register it before the checkpointer.

    Attributes:
        num_images: images that the run has trained on, an image in two epochs twice.
        num_bad: images that it could not use, counted in the same way.
    """

    trainer: SimpleTrainer

    def __init__(self, output_dir: str, images_per_iter: int, max_share: float) -> None:
        """
        Args:
            images_per_iter: of all ranks together.
            max_share: of both together, 0..1; from the tenth bad one on more is an error, with 0 the first is.
        """
        self.path = os.path.join(output_dir, FILE_NAME)
        self.images_per_iter = images_per_iter
        self.max_share = max_share
        self.num_images = 0
        self.num_bad = 0
        self._latest: list[Event] = []
        self._unwritten: list[str] = []

    def before_train(self) -> None:
        comm.on_main_process(self._drop_repeated)

    def after_flush(self) -> None:
        mine, self.trainer.bad_images = self.trainer.bad_images, []
        gathered = [event for part in comm.all_gather(mine) for event in part]
        events = sorted(
            gathered, key=lambda event: (event[0], event[1].position)
        )  # stable: tries of a position in order
        if events:
            comm.on_main_process(lambda: self._write(events))
            self._latest = events
            self.num_bad += len(events)

    def after_step(self) -> None:
        """
        Raises:
            DataError: if too many images could not be used; on all ranks.
        """
        self.num_images += self.images_per_iter
        # Not at each flush: one before a pause would be in the history of the resumed run alone.
        if (self.trainer.iter + 1) % self.trainer.gather_metric_period == 0:
            self.trainer.storage.put_scalar("bad_images", self.num_bad, smoothing_hint=False)
        fewest = FEWEST_TO_JUDGE if self.max_share else 1
        if self.num_bad >= fewest and self.num_bad > self.max_share * (self.num_images + self.num_bad):
            raise DataError(self._too_many())

    def after_train(self) -> None:
        # After an error the ranks may stand in different iterations; what was not gathered, a resumed run meets again.
        if not self.trainer.succeeded and not comm.is_distributed() and self.trainer.bad_images:
            self.after_flush()

    def _too_many(self) -> str:
        num_tried = self.num_images + self.num_bad
        listed = "".join(f"\n  {printable(bad.path)}: {printable(bad.cause)}" for _, bad in self._latest[:3])
        return (
            f"{self.num_bad} of {num_tried} images so far could not be used ({self.num_bad / num_tried:.2%}), and "
            f"DATALOADER.MAX_BAD_IMAGE_SHARE is {self.max_share:g}. All are listed in {self.path}. Repair or remove them, "
            f"or raise the key and go on with --resume.{listed}"
        )

    def _drop_repeated(self) -> None:
        if not os.path.exists(self.path):
            return
        # Bytes that are no text (of a damaged disk) go as they came.
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = file.readlines()
        kept = [line for line in lines if _is_before(line, self.trainer.start_iter)]
        if kept != lines:
            with atomic_write(self.path) as file:
                file.writelines(line.encode("utf-8", "surrogateescape") for line in kept)

    def _write(self, events: list[Event]) -> None:
        # On disk before the checkpoint that counts them, or as soon as the disk takes them.
        self._unwritten += [_line(*event) for event in events]
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self._unwritten)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            del self._unwritten[:-_MOST_UNWRITTEN]
            logger.error("%s cannot be written, and %d lines wait: %s", self.path, len(self._unwritten), error)
        else:
            self._unwritten = []
        for number, (iteration, bad) in enumerate(events, self.num_bad + 1):
            if number > _MOST_WARNINGS:
                break
            more = f" Further ones are only listed in {self.path}." if number == _MOST_WARNINGS else ""
            logger.warning(
                "%s cannot be used (%s). Another image took its place, position %d in iteration %d.%s",
                *(_escaped(bad.path), _escaped(bad.cause), bad.position, iteration, more),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_images": self.num_images, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_images, self.num_bad = state["num_images"], state["num_bad"]


def _line(iteration: int, bad: BadImage) -> str:
    return f"{iteration}\t{bad.position}\t{_escaped(bad.path)}\t{_escaped(bad.cause)}\n"


def _escaped(text: str) -> str:
    """On one line, in one field, and so that the name can be had back: names of files may hold any byte."""
    return printable(text.replace("\\", "\\\\"))


def _is_before(line: str, iteration: int) -> bool:
    """Whether a complete line is of an earlier iteration."""
    first = line.split("\t", 1)[0]
    return line.endswith("\n") and first.isdecimal() and int(first) < iteration
