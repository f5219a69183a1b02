"""From samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dinoengine.data.crop_tables import Crop
from dinoengine.data.decoded_batch import DecodedBatch, finish_batch
from dinoengine.data.masking import MaskPlan
from dinoengine.structures import BadImage, ImageBatch, SSLBatch


class CropSample(NamedTuple):
    """The crops of one image: G of [C, H, W] and L of [C, h, w], its position in the stream, its index in the dataset, the
    images it replaces, and which entry of DATASETS.TRAIN it is from if there are several."""

    position: int
    image_index: int
    global_crops: Sequence[Crop]
    local_crops: Sequence[Crop]
    bad_images: tuple[BadImage, ...] = ()
    source: int | None = None


@dataclass
class LabelledImage:
    """One crop of an image [C, H, W], its label (None without labels), its index in the dataset, its mask [H, W] if any,
    the images it replaces, and which entry of DATASETS.TRAIN it is from if there are several."""

    image: Crop
    label: int | None
    index: int
    mask: Tensor | None = None
    bad_images: tuple[BadImage, ...] = ()
    source: int | None = None


class SSLCollate:
    """CropSamples -> SSLBatch (DecodedBatch where their crops are pending), with masks from the plan (or none)."""

    def __init__(self, mask_plan: MaskPlan | None) -> None:
        self.mask_plan = mask_plan

    def __call__(self, samples: list[CropSample]) -> SSLBatch | DecodedBatch:
        positions = [s.position for s in samples]
        num_global, num_local = len(samples[0].global_crops), len(samples[0].local_crops)
        # View-major: all first views, then all second views.
        crops = {"global_crops": [s.global_crops[view] for view in range(num_global) for s in samples]}
        if num_local:
            crops["local_crops"] = [s.local_crops[view] for view in range(num_local) for s in samples]
        masks = None
        if self.mask_plan is not None:
            if self.mask_plan.num_views != num_global:
                raise ValueError(
                    f"The augmentation makes {num_global} global views, but masks are planned for "
                    f"{self.mask_plan.num_views}; set MODEL.LOSS.IBOT_WEIGHT 0 or make as many views."
                )
            masks = torch.from_numpy(self.mask_plan.masks(positions))
        rest = SSLBatch(
            global_crops=_no_crops(),
            local_crops=_no_crops() if num_local else None,
            masks=masks,
            positions=torch.tensor(positions, dtype=torch.int64),
            num_global_views=num_global,
            num_local_views=num_local,
            bad_images=tuple(bad for s in samples for bad in s.bad_images),
            sources=_sources(samples),
        )
        return finish_batch(rest, crops)


def collate_images(samples: list[LabelledImage]) -> ImageBatch | DecodedBatch:
    """LabelledImages -> ImageBatch (DecodedBatch where their crops are pending); labels and masks are None if the dataset
    has none."""
    labels = [s.label for s in samples]
    masks = [s.mask for s in samples if s.mask is not None]
    has_labels = all(label is not None for label in labels)
    rest = ImageBatch(
        images=_no_crops(),
        labels=torch.tensor(labels, dtype=torch.int64) if has_labels else None,
        indices=torch.tensor([s.index for s in samples], dtype=torch.int64),
        masks=torch.stack(masks) if len(masks) == len(samples) else None,
        bad_images=tuple(bad for s in samples for bad in s.bad_images),
        sources=_sources(samples),
    )
    return finish_batch(rest, {"images": [s.image for s in samples]})


def _no_crops() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _sources(samples: Sequence[CropSample | LabelledImage]) -> torch.Tensor | None:
    sources = [s.source for s in samples if s.source is not None]
    return torch.tensor(sources, dtype=torch.int64) if len(sources) == len(samples) else None
