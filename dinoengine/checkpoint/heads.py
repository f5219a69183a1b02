"""Heads as files store them: what they were built with, by the shapes of their entries."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from dinoengine.checkpoint.files import CheckpointError, StateDict, grouped_names, short_list
from dinoengine.modeling.heads.dino_head import DINOHead

# Width of a linear head over the backbone's -> (blocks, mean patch token).
_INPUTS = {1: (1, False), 2: (1, True), 4: (4, False), 5: (4, True)}
# torch's newer weight_norm -> the names of the older one, which published files have.
_NEWER_WEIGHT_NORM = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}

Shapes = dict[str, tuple[int, ...]]


def is_dino_head(part: str) -> bool:
    """Whether a part of ``Weights`` is a projection head, the teacher's or the student's."""
    return part.rpartition(".")[2] in ("dino_head", "ibot_head")


def with_older_names(entries: StateDict) -> StateDict:
    """The entries of a projection head under the names of ``DINOHead``."""
    return {_NEWER_WEIGHT_NORM.get(name, name): value for name, value in entries.items()}


def head_arguments(entries: StateDict, what: str = "The file") -> dict[str, int]:
    """What DINOHead was built with, but for the width of its input, read off the shapes of its entries.

    Raises:
        CheckpointError: if there is no MLP or no weight-normalised last layer; names ``what``.
    """
    layers = sorted(
        int(match[1])
        for name, value in entries.items()
        if (match := re.fullmatch(r"mlp\.(\d+)\.weight", name)) and value.ndim == 2
    )
    prototypes = entries.get("last_layer.weight_v")
    if not layers or prototypes is None or prototypes.ndim != 2:
        raise CheckpointError(
            f"{what} that is no DINO head (an MLP and last_layer.weight_g, weight_v of two dimensions); it has "
            f"{short_list(grouped_names(list(entries)))}."
        )
    num_prototypes, bottleneck_dim = prototypes.shape
    return {
        "num_prototypes": num_prototypes,
        "hidden_dim": entries[f"mlp.{layers[0]}.weight"].shape[0],
        "bottleneck_dim": bottleneck_dim,
        "num_layers": len(layers),
    }


def dino_head_shapes(entries: StateDict, embed_dim: int, path: str, part: str) -> Shapes:
    """Every entry that the head ``part`` of a file should have.

    Raises:
        CheckpointError: if it is no such head.
    """
    arguments = head_arguments(entries, f"{path} has a {part}")
    with torch.device("meta"):
        head = DINOHead(embed_dim, **arguments)
    return {name: tuple(value.shape) for name, value in head.state_dict().items()}


def linear_head_shapes(entries: StateDict) -> Shapes:
    """As ``dino_head_shapes``, of a linear head; which widths there are, ``head_shape`` knows."""
    classes, width = (*(entries["weight"].shape if "weight" in entries else ()), 0, 0)[:2]
    return {"weight": (classes, width), "bias": (classes,)}


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
