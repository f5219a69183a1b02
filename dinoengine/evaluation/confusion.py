"""Results of a segmentation: which class got which answer, pixel by pixel."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from dinoengine.data import ImageDataset
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.structures import IGNORE
from dinoengine.utils import comm

logger = logging.getLogger(__name__)


class ConfusionMatrix:
    """Counts pixels by their class and by the answer, on all processes."""

    def __init__(self, num_classes: int, dataset: ImageDataset | None = None) -> None:
        """
        Args:
            dataset: names its images in messages.
        """
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._finite = FiniteCheck(dataset, "scores")

    def add(self, scores: Tensor, masks: Tensor, indices: Tensor) -> None:
        """Answer with the class of the highest score, after bilinear interpolation to the size of the mask.

        Args:
            scores: [B, K, h, w] float.
            masks: [B, H, W] uint8, class or ``IGNORE``.
            indices: [B], of the images in their dataset.
        """
        self._finite.see(scores, indices)
        num_classes = len(self._counts)
        for image_scores, mask in zip(scores, masks, strict=True):  # one by one: K * H * W floats may be many
            full = F.interpolate(image_scores[None].float(), size=mask.shape, mode="bilinear", align_corners=False)
            answers = full[0].argmax(0)  # [H, W]
            counted = mask != IGNORE
            pairs = mask[counted].long() * num_classes + answers[counted]
            counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
            self._counts += counts.cpu()

    def finish(self) -> Tensor:
        """[K, K] int64, rows: class, columns: answer; of all processes.

        Raises:
            ValueError: if a score was not finite (names the images), or no pixel has a class.
        """
        self._finite.finish()
        counts = torch.stack(comm.all_gather(self._counts)).sum(0)
        if not counts.any():
            raise ValueError("No pixel of the masks of the test set has a class; see the key ignore= of the dataset.")
        return counts


def iou_per_class(counts: Tensor) -> Tensor:
    """Intersection over union of each class: right / (pixels of the class + answers - right).

    Args:
        counts: [K, K], see ``ConfusionMatrix.finish``.

    Returns:
        [K] float64 in 0..1; NaN for a class without any pixel.
    """
    counts = counts.double()
    right, pixels, answers = counts.diagonal(), counts.sum(1), counts.sum(0)
    return torch.where(pixels > 0, right / (pixels + answers - right).clamp(min=1), torch.nan)


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """``miou`` (mean over the classes that have pixels) and ``pixel_accuracy``, in percent."""
    return {
        "miou": 100.0 * iou_per_class(counts).nanmean().item(),
        "pixel_accuracy": 100.0 * (counts.diagonal().sum() / counts.sum()).item(),
    }


def log_iou_per_class(counts: Tensor, class_names: Sequence[str], what: str) -> None:
    """A table of IoU and number of pixels of each class that has pixels; ``what`` was evaluated."""
    rows = [
        (name, 100.0 * iou, pixels)
        for name, iou, pixels in zip(class_names, iou_per_class(counts).tolist(), counts.sum(1).tolist(), strict=True)
        if pixels
    ]
    logger.info("%s:\n%s", what, tabulate(rows, headers=("class", "IoU", "pixels"), floatfmt=".2f"))
