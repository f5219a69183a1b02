"""Files of Meta's linear heads, ``dinov2_*_linear_head.pth`` and ``dinov2_*_linear4_head.pth``, in and out."""

from __future__ import annotations

import logging

import torch

from dinoengine.checkpoint.files import CheckpointError, StateDict, short_list
from dinoengine.checkpoint.heads import HeadShape, head_shape
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.layout import is_state_dict
from dinoengine.checkpoint.output import require_free
from dinoengine.checkpoint.reading import read_content
from dinoengine.utils.file_writing import atomic_write

logger = logging.getLogger(__name__)


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
