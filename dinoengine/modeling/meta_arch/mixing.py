"""Mixup and CutMix: training images that are made of two, and targets to match."""

from __future__ import annotations

from dataclasses import replace

import torch

from dinoengine.structures import ImageBatch


class BatchMixing:
    """Mixes every image of a batch with its neighbour in the batch, by torchvision's MixUp or CutMix.

    MixUp (arXiv:1710.09412) takes lambda of one image and 1 - lambda of the other, CutMix (arXiv:1905.04899) a box of the
    other that covers 1 - lambda of the image; lambda is drawn from Beta(alpha, alpha), once per batch. With both, each
    batch gets one of them with equal probability. All draws are from torch's CPU generator, which a trainer seeds at every
    step from (seed, iteration, rank); a batch is mixed within its process.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float) -> None:
        """
        Args:
            mixup_alpha, cutmix_alpha: of the Beta distribution; 0: not that one. At least one is above 0.
        """
        from torchvision.transforms import v2

        assert mixup_alpha > 0 or cutmix_alpha > 0
        mixers = [v2.MixUp(alpha=mixup_alpha, num_classes=num_classes)] if mixup_alpha > 0 else []
        mixers += [v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes)] if cutmix_alpha > 0 else []
        self._mix = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)

    def __call__(self, batch: ImageBatch) -> ImageBatch:
        """The batch with float32 images in 0..1 and labels [B, classes] float32 whose rows add up to 1."""
        images = batch.images.float() / 255.0 if batch.images.dtype == torch.uint8 else batch.images.float()
        images, labels = self._mix(images, batch.labels)
        return replace(batch, images=images, labels=labels)
