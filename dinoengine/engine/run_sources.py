"""The files behind a config: whether a resumed run still has the images, weights of images and start that it had.

The config of a checkpoint names them; their content may have changed under the same name. That is told and not refused: a
run whose disk has lost an image must be able to go on.
"""

from __future__ import annotations

import logging
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.data.fingerprint import file_fingerprint
from dinoengine.utils import comm

logger = logging.getLogger(__name__)

_FROM_HERE_ON = "is another one from here on"


class RunSources:
    """Facts of a run's sources, for its checkpoints."""

    def __init__(self, cfg: CfgNode, images: Any) -> None:
        """A collective operation: the first process reads.

        Args:
            images: the training set, if the loader tells.
        """
        self._num_images = None if images is None else len(images)
        self._weights_file: str = cfg.MODEL.WEIGHTS
        self._images, self._sample_weights, self._weights = comm.on_main_process(  # the others need not read as well
            lambda: (
                images.fingerprint() if isinstance(images, ImageDataset) else None,
                file_fingerprint(cfg.DATALOADER.SAMPLE_WEIGHTS) if cfg.DATALOADER.SAMPLE_WEIGHTS else None,
                file_fingerprint(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_training_images": self._num_images,
            "training_images": self._images,
            "sample_weights": self._sample_weights,
            "start_weights": {"file": self._weights_file, "fingerprint": self._weights},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Log what has changed. The weights that the run started from stay those that the state names."""
        before = state.get("num_training_images")
        if before != self._num_images:
            logger.warning(
                "The training set had %s images when this checkpoint was written and has %s now: the order of images, "
                "crops and masks %s.",
                before,
                self._num_images,
                _FROM_HERE_ON,
            )
        elif _differ(state.get("training_images"), self._images):
            logger.warning(
                "The training set has %s images as when this checkpoint was written, but they have other names, another "
                "order or other labels: a folder, a list or a file of DATASETS.QUARANTINE was changed. Which image comes "
                "when %s.",
                self._num_images,
                _FROM_HERE_ON,
            )
        if _differ(state.get("sample_weights"), self._sample_weights):
            logger.warning(
                "DATALOADER.SAMPLE_WEIGHTS has another content than when this checkpoint was written: which image comes "
                "when %s.",
                _FROM_HERE_ON,
            )
        start = state.get("start_weights")
        if start is None:  # of a version that did not know it
            return
        if start["file"] == self._weights_file and _differ(start["fingerprint"], self._weights):
            logger.warning(
                "MODEL.WEIGHTS %s has another content than when this run started from it. This run goes on from its own "
                "checkpoint, but its config no longer tells how to repeat it.",
                self._weights_file,
            )
        self._weights_file, self._weights = start["file"], start["fingerprint"]


def _differ(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now
