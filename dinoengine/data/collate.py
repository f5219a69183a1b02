"""From samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dinoengine.data.masking import MaskPlan
from dinoengine.structures import BadImage, ImageBatch, SSLBatch


class CropSample(NamedTuple):
    """The crops of one image: G tensors [C, H, W] and L tensors [C, h, w], its position in the stream, its index in the
    dataset, the images it replaces, and which entry of DATASETS.TRAIN it is from if there are several."""

    position: int
    image_index: int
    global_crops: list[Tensor]
    local_crops: list[Tensor]
    bad_images: tuple[BadImage, ...] = ()
    source: int | None = None


@dataclass
class LabelledImage:
    """One crop of an image [C, H, W], its label (None without labels), its index in the dataset, its mask [H, W] if any,
    the images it replaces, and which entry of DATASETS.TRAIN it is from if there are several."""

    image: Tensor
    label: int | None
    index: int
    mask: Tensor | None = None
    bad_images: tuple[BadImage, ...] = ()
    source: int | None = None


class SSLCollate:
    """CropSamples -> SSLBatch, with masks from the plan (or none)."""

    def __init__(self, mask_plan: MaskPlan | None) -> None:
        self.mask_plan = mask_plan

    def __call__(self, samples: list[CropSample]) -> SSLBatch:
        positions = [s.position for s in samples]
        num_global, num_local = len(samples[0].global_crops), len(samples[0].local_crops)
        # View-major: all first views, then all second views.
        global_crops = torch.stack([s.global_crops[view] for view in range(num_global) for s in samples])
        local_crops = None
        if num_local:
            local_crops = torch.stack([s.local_crops[view] for view in range(num_local) for s in samples])
        masks = None
        if self.mask_plan is not None:
            if self.mask_plan.num_views != num_global:
                raise ValueError(
                    f"The augmentation makes {num_global} global views, but masks are planned for "
                    f"{self.mask_plan.num_views}; set MODEL.LOSS.IBOT_WEIGHT 0 or make as many views."
                )
            masks = torch.from_numpy(self.mask_plan.masks(positions))
        return SSLBatch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            positions=torch.tensor(positions, dtype=torch.int64),
            num_global_views=num_global,
            num_local_views=num_local,
            bad_images=tuple(bad for s in samples for bad in s.bad_images),
            sources=_sources(samples),
        )


def collate_images(samples: list[LabelledImage]) -> ImageBatch:
    """LabelledImages -> ImageBatch; labels and masks are None if the dataset has none."""
    labels = [s.label for s in samples]
    masks = [s.mask for s in samples if s.mask is not None]
    has_labels = all(label is not None for label in labels)
    return ImageBatch(
        images=torch.stack([s.image for s in samples]),
        labels=torch.tensor(labels, dtype=torch.int64) if has_labels else None,
        indices=torch.tensor([s.index for s in samples], dtype=torch.int64),
        masks=torch.stack(masks) if len(masks) == len(samples) else None,
        bad_images=tuple(bad for s in samples for bad in s.bad_images),
        sources=_sources(samples),
    )


def _sources(samples: Sequence[CropSample | LabelledImage]) -> torch.Tensor | None:
    sources = [s.source for s in samples if s.source is not None]
    return torch.tensor(sources, dtype=torch.int64) if len(sources) == len(samples) else None
