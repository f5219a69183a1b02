"""How the heads of a linear probe are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.evaluation.linear_heads import HeadGrid


@dataclass(frozen=True)
class LinearSettings:
    """How the heads are trained; as published for ImageNet-1k if nothing is given.

    Attributes:
        grid: the heads.
        num_iters: steps of SGD.
        ims_per_batch: images of the global batch.
        crop_size_px, crop_scale, crop_ratio, hflip_prob: what the training batches are made with, for the protocol.
        seed: of the heads' initial weights and the order of the training images.
        cached: train on the features of un-augmented evaluation crops, computed once.
        val_period: iterations between looks at the validation set, for the log; 0: only at the end.
        checkpoint_period: iterations between checkpoints; 0: none.
    """

    grid: HeadGrid = field(default_factory=HeadGrid)
    num_iters: int = 12500
    ims_per_batch: int = 1024
    crop_size_px: Sequence[int] = (224,)
    crop_scale: Sequence[float] = (0.08, 1.0)
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip_prob: float = 0.5
    seed: int = 0
    cached: bool = False
    val_period: int = 0
    checkpoint_period: int = 1000

    @classmethod
    def from_config(cls, cfg: CfgNode, num_train_images: int) -> LinearSettings:
        """TEST.LINEAR; the number of images turns passes into iterations."""
        linear = cfg.TEST.LINEAR
        return cls(
            grid=HeadGrid(linear.BASE_LRS, linear.NUM_LAST_BLOCKS, linear.MEAN_PATCH),
            num_iters=linear.ITERS or math.ceil(linear.EPOCHS * num_train_images / linear.IMS_PER_BATCH),
            ims_per_batch=linear.IMS_PER_BATCH,
            crop_size_px=cfg.INPUT.TEST.CROP_SIZE_PX,
            crop_scale=linear.CROP_SCALE,
            crop_ratio=cfg.INPUT.CROP_RATIO,
            hflip_prob=linear.HFLIP_PROB,
            seed=linear.SEED,
            cached=linear.CACHED,
            val_period=linear.VAL_PERIOD,
            checkpoint_period=linear.CHECKPOINT_PERIOD,
        )

    def protocol(self) -> dict[str, Any]:
        """For ``DatasetEvaluator.protocol``: what the trained heads depend on."""
        augmentation: Any = {
            "crop_size_px": list(self.crop_size_px),
            "crop_scale": list(self.crop_scale),
            "crop_ratio": list(self.crop_ratio),
            "hflip_prob": self.hflip_prob,
        }
        return {
            "iterations": self.num_iters,
            "ims_per_batch": self.ims_per_batch,
            "base_lrs": list(self.grid.base_lrs),
            "num_last_blocks": list(self.grid.num_last_blocks),
            "mean_patch": list(self.grid.mean_patch),
            "augmentation": "none: cached features of evaluation crops" if self.cached else augmentation,
            "seed": self.seed,
        }
