"""Files of Meta's linear heads, ``dinov2_*_linear_head.pth`` and ``dinov2_*_linear4_head.pth``, in and out."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from dinoengine.checkpoint.convert import require_free
from dinoengine.checkpoint.files import CheckpointError, StateDict, read_content, short_list
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.layout import is_state_dict
from dinoengine.utils.file_io import atomic_write

logger = logging.getLogger(__name__)


class HeadShape(NamedTuple):
    """What a linear head makes of what: see MODEL.CLASSIFIER."""

    num_classes: int
    num_last_blocks: int
    mean_patch: bool

    def describe(self) -> str:
        """``1000 classes from the CLS token of the last block and its mean patch token``."""
        blocks = "the last block" if self.num_last_blocks == 1 else f"each of the last {self.num_last_blocks} blocks"
        mean = " and the mean patch token of the last" if self.mean_patch else ""
        return f"{self.num_classes} classes from the CLS token of {blocks}{mean}"


# Width over the backbone's width -> (blocks, mean patch token).
_INPUTS = {1: (1, False), 2: (1, True), 4: (4, False), 5: (4, True)}


def read_linear_head(path: str) -> StateDict:
    """``{"weight": [classes, width], "bias": [classes]}`` of a file.

    Raises:
        FileNotFoundError, CheckpointError: if it cannot be read, or is no linear head.
    """
    entries = read_content(path).data
    if not is_state_dict(entries) or entries.keys() != {"weight", "bias"}:
        raise CheckpointError(
            f"{path} is no linear head, which has 'weight' and 'bias' alone; it has "
            f"{short_list(list(entries)) or 'nothing'}."
        )
    weight, bias = entries["weight"], entries["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{path} is no linear head: weight {list(weight.shape)} and bias {list(bias.shape)} are not [classes, width] "
            "and [classes]."
        )
    return {"weight": weight, "bias": bias}


def head_shape(head: StateDict, embed_dim: int, path: str) -> HeadShape:
    """What the head takes, by its width: that of the backbone times 1, 2 (with the mean patch), 4 or 5 (4 blocks).

    Raises:
        CheckpointError: for any other width; it is then of another backbone.
    """
    num_classes, width = head["weight"].shape
    if width % embed_dim or width // embed_dim not in _INPUTS:
        raise CheckpointError(
            f"The linear head of {path} is {width} wide. On a backbone of {embed_dim} channels it would be "
            f"{', '.join(str(times * embed_dim) for times in _INPUTS)}; it belongs to another backbone."
        )
    return HeadShape(num_classes, *_INPUTS[width // embed_dim])


def export_linear_head(
    source: str, target: str, *, layout: str = "auto", hints: Hints | None = None, overwrite: bool = False
) -> HeadShape:
    """Write the head of a classifier as a file of Meta's layout, to the bit.

    Args:
        source: a classifier of any layout that has them (ours, or of transformers).

    Raises:
        FileNotFoundError, CheckpointError: if the source is no classifier, or ``target`` exists.
    """
    require_free(target, overwrite, source)
    weights = read_weights(source, layout, hints)
    if "linear_head" not in weights.parts:
        raise CheckpointError(
            f"{source} (layout {weights.layout}, {weights.spec.describe()}) has no linear head; it has "
            f"{', '.join(weights.parts)}. Give the checkpoint of a classifier."
        )
    head = {name: weights.parts["linear_head"][name].clone() for name in ("weight", "bias")}
    shape = head_shape(head, weights.spec.embed_dim, source)
    with atomic_write(target) as file:
        torch.save(head, file)
    logger.info("Wrote %s: %s (weight %s).", target, shape.describe(), list(head["weight"].shape))
    return shape
