"""Models whose patch tokens can be computed by hand, and a config that evaluates on drawn masks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode
from dinoengine.structures import BackboneOutput
from tests.masks import CELL_PX, SIZE_PX, write_mask_folder


class ColourPatches(nn.Module):
    """The token of a 4 x 4 patch is its mean colour, [B, 64, 3] of an image of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def tokens(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float() / 255, CELL_PX).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> BackboneOutput:
        tokens = self.tokens(images) * self.weight
        grid = (images.shape[2] // CELL_PX, images.shape[3] // CELL_PX)
        return BackboneOutput(tokens.mean(1), tokens[:, :0], tokens, grid)


class ConstantPatches(ColourPatches):
    """All patches look the same."""

    def tokens(self, images: Tensor) -> Tensor:
        return torch.ones_like(super().tokens(images))


class BrokenPatches(ColourPatches):
    """NaN for images whose first pixel is white; a test makes one."""

    def tokens(self, images: Tensor) -> Tensor:
        return super().tokens(images).masked_fill((images[:, :, 0, 0] == 255).all(1)[:, None, None], torch.nan)


def use_masks(cfg: CfgNode, folder: Path, evaluator: str) -> str:
    """Let ``cfg`` evaluate on 6 drawn images after learning from 10 others; returns the test set."""
    cfg.DATASETS.TRAIN = (write_mask_folder(folder / "train", 10),)
    test = write_mask_folder(folder / "test", 6, first_seed=100)
    cfg.merge_from_list(["INPUT.TEST.CROP_SIZE_PX", SIZE_PX, "INPUT.TEST.RESIZE_PX", 0, "TEST.IMS_PER_BATCH", 4])
    cfg.merge_from_list(["DATASETS.TEST", test, "TEST.EVALUATORS", f"('{evaluator}',)", "DATALOADER.NUM_WORKERS", 0])
    return test
