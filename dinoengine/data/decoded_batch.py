"""Crops made on the device of the training: INPUT.AUGMENTATION_BACKEND "device".

    worker    decode -> the recipes of MultiCrop or SingleCrop, the random numbers of every backend -> PendingCrop
    collate   the images of a batch end to end, and tables of the recipes (``crop_tables``) -> DecodedBatch
    transfer  DecodedBatch.to(device), on the side stream where there is one: copy, then ``make_crops`` -> the batch as the
              other backends give it

So the workers only decode, and what crosses the bus are images instead of crops. The trainer, loops of one's own and tools
ask a batch for ``to(device)`` anyway; they need not know.

``make_crops`` resizes all regions of a size in a few batches (``batched_resize``), then does each operation to all crops it
was drawn for (``batched_colour``). It never waits for the device. A crop is that of ``render_reference`` but for a few
pixels in a thousand that differ by a level after the resize. It does not depend on the rest of the batch, and so neither on
the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinoengine.data.batched_colour import OPERATIONS
from dinoengine.data.batched_resize import MAX_VALUES, resize_regions
from dinoengine.data.crop_tables import Crop, CropPlan, CropTables, PendingCrop, tabulate_crops
from dinoengine.structures import Batch, ImageBatch, SSLBatch

_ON_ALL_CHANNELS = ("flip", "blur")  # others leave alpha as it is


@dataclass
class DecodedBatch:
    """The images of a batch and what is to be done to them; ``to`` gives the batch of their crops.

    Attributes:
        rest: the batch without its crops, which are empty tensors.
        tables: the images and the numbers of all crops.
        plans: by the name of the field of ``rest`` that the crops are for.
    """

    rest: SSLBatch | ImageBatch
    tables: CropTables
    plans: dict[str, CropPlan]

    def __len__(self) -> int:
        return len(self.rest.positions if isinstance(self.rest, SSLBatch) else self.rest.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SSLBatch | ImageBatch:
        """The batch on ``device``, its crops made there."""
        return self.copied_to(device, non_blocking).with_crops()

    def copied_to(self, device: torch.device | str, non_blocking: bool = False) -> DecodedBatch:
        """The same on ``device``, without crops as yet."""
        tables = CropTables(*(table.to(device, non_blocking=non_blocking) for table in self.tables))
        return replace(self, rest=self.rest.to(device, non_blocking), tables=tables)

    def with_crops(self) -> SSLBatch | ImageBatch:
        """The batch where it is, its crops made."""
        crops: dict[str, Any] = {name: make_crops(self.tables, plan) for name, plan in self.plans.items()}
        return replace(self.rest, **crops)

    def pin_memory(self) -> DecodedBatch:
        """Called by the DataLoader when ``pin_memory=True``."""
        tables = CropTables(*(table.pin_memory() for table in self.tables))
        return replace(self, rest=self.rest.pin_memory(), tables=tables)

    def record_stream(self, stream: Any) -> None:
        """See ``SSLBatch.record_stream``; what has it is fetched ahead."""
        for table in self.tables:
            table.record_stream(stream)
        self.rest.record_stream(stream)


def finish_batch(rest: Batch, crops: Mapping[str, Sequence[Any]]) -> Batch | DecodedBatch:
    """A batch with crops, or with what they will be made of.

    Args:
        rest: without its crops.
        crops: by the name of their field; all tensors, or all ``PendingCrop``.
    """
    if isinstance(next(iter(crops.values()))[0], PendingCrop):
        tables, plans = tabulate_crops(list(crops.values()))
        return DecodedBatch(rest, tables, dict(zip(crops, plans, strict=True)))
    made: dict[str, Any] = {name: torch.stack(list(of_field)) for name, of_field in crops.items()}
    return replace(rest, **made)


def made_crops(crops: Sequence[Crop]) -> list[Tensor]:
    """Crops of one image, each [C, rows, columns] uint8; those that are pending are made here, on the CPU."""
    made = []
    for crop in crops:
        if isinstance(crop, PendingCrop):
            tables, (plan,) = tabulate_crops([[crop]])
            crop = make_crops(tables, plan)[0]
        made.append(crop)
    return made


def make_crops(tables: CropTables, plan: CropPlan) -> Tensor:
    """[crops of the plan, C, rows, columns] uint8, on the device of the tables; the same within autocast."""
    with _without_autocast(tables.pixels.device.type):
        return _make_crops(tables, plan)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the sums of a resize, which are whole numbers."""
    is_known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if is_known else contextlib.nullcontext()


def _make_crops(tables: CropTables, plan: CropPlan) -> Tensor:
    shape = (plan.num_crops, plan.num_channels, *plan.size)
    crops = torch.empty(shape, dtype=torch.uint8, device=tables.pixels.device)
    for first, last, largest, height_first in plan.resizes:
        regions = tables.regions[first:last]
        size = plan.size[::-1] if height_first else plan.size
        resized = resize_regions(tables.pixels, regions[:, :5], largest, size)
        crops.index_copy_(0, regions[:, 5], resized.transpose(2, 3) if height_first else resized)
    crops_at_once = max(1, MAX_VALUES // (4 * crops[0].numel()))  # hue needs several arrays of 8 bytes
    for step in plan.steps:
        rows = tables.rows[step.first : step.last]
        last_value = step.first_value + len(rows) * step.width
        values = tables.values[step.first_value : last_value].view(len(rows), step.width)
        target = crops if step.operation in _ON_ALL_CHANNELS else crops[:, :3]
        for some, told in zip(rows.split(crops_at_once), values.split(crops_at_once), strict=True):
            target.index_copy_(0, some, OPERATIONS[step.operation](target.index_select(0, some), told))
    return crops
