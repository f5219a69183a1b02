"""The tensors of a batch as a table, read from the batch itself."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from torch import Tensor

from dinoengine.structures import ImageBatch, SSLBatch

_SOURCES = "[B] entry of DATASETS.TRAIN that each image is from"
# Letters as in structures.py.
_MEANINGS: dict[type, dict[str, str]] = {
    SSLBatch: {
        "global_crops": "[G*B, C, H, W] global views, all first views before all second ones",
        "local_crops": "[L*B, C, h, w] local views, in the same order",
        "masks": "[G*B, N] patches of the global views that the student sees as mask token",
        "positions": "[B] position of each image in the sample stream",
        "sources": _SOURCES,
    },
    ImageBatch: {
        "images": "[B, C, H, W] one crop of each image",
        "labels": "[B] class of each image",
        "indices": "[B] index of each image in its dataset",
        "masks": "[B, H, W] class of each pixel, 255 where there is none",
        "sources": _SOURCES,
    },
}
_ABSENT: dict[type, dict[str, str]] = {
    SSLBatch: {"local_crops": "INPUT.LOCAL_CROPS.NUM is 0", "masks": "MODEL.LOSS.IBOT_WEIGHT is 0"},
    ImageBatch: {"labels": "the dataset has no labels", "masks": "the dataset has no masks"},
}


class TensorRow(NamedTuple):
    """One tensor of a batch; shape and dtype are "none" where the batch does not have it."""

    name: str
    shape: str
    dtype: str
    meaning: str


def describe_batch(batch: SSLBatch | ImageBatch) -> list[TensorRow]:
    """A row for each tensor of a batch as a loader made it, and for each that this config leaves out, with the reason.

    Numbers of a batch (views) and what is attached later (targets) are no inputs and have no row.
    """
    rows = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            rows.append(TensorRow(field.name, str(tuple(value.shape)), dtype, _MEANINGS[type(batch)][field.name]))
        elif field.name in _ABSENT[type(batch)]:
            rows.append(TensorRow(field.name, "none", "none", _ABSENT[type(batch)][field.name]))
    return rows
