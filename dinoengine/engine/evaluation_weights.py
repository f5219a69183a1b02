"""The weights that an evaluation without training takes."""

from __future__ import annotations

import logging

from torch import nn

from dinoengine.checkpoint import Checkpointer
from dinoengine.checkpoint.pixels import require_same_pixels
from dinoengine.config import CfgNode, ConfigError
from dinoengine.utils import comm

logger = logging.getLogger(__name__)


def load_weights_for_evaluation(cfg: CfgNode, model: nn.Module, *, resume: bool) -> str:
    """Load what --eval-only evaluates, the last checkpoint with --resume, else MODEL.WEIGHTS; returns its path.

    Raises:
        ConfigError: if there is neither, or the weights were trained with other pixels.
        CheckpointError, FileNotFoundError: if the weights cannot be loaded.
    """
    checkpointer = Checkpointer(
        model, cfg.OUTPUT_DIR, strict=cfg.MODEL.WEIGHTS_STRICT, before_weights=require_same_pixels(cfg)
    )
    if not cfg.MODEL.WEIGHTS and not (resume and comm.on_main_process(checkpointer.has_checkpoint)):
        raise ConfigError(
            "MODEL.WEIGHTS",
            ["is empty, so there is nothing to evaluate: name a checkpoint, or --resume with the OUTPUT_DIR of a run."],
        )
    path = (comm.on_main_process(checkpointer.get_checkpoint_file) if resume else "") or cfg.MODEL.WEIGHTS
    logger.info("Evaluating the weights of %s.", path)
    checkpointer.load_weights(path)
    return path
