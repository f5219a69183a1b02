"""What ``train_step.py`` times: one class each, built from a config and a batch; calling it does one step."""

from __future__ import annotations

import torch

from dinoengine.config import CfgNode
from dinoengine.engine.bare_step import BareStep
from dinoengine.modeling.backbone import VIT_SIZES, build_backbone
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.structures import SSLBatch
from step.published import PublishedStep


class OurStep:
    """The whole step as ``train_net.py`` does it, without the loader and the writers."""

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        self.step = BareStep(cfg, batch)

    def __call__(self) -> float:
        self.step()
        return float(self.step.trainer.last_losses["total_loss"])


class OurCompiledStep(OurStep):
    """The same with MODEL.COMPILE."""

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        cfg.MODEL.COMPILE = True
        super().__init__(cfg, batch)


class Published:
    """The published step in plain torch, on the same crops and masks."""

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        torch.manual_seed(0)
        size = VIT_SIZES[cfg.MODEL.VIT.SIZE]
        self.step = PublishedStep(
            dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            patch=cfg.MODEL.VIT.PATCH_SIZE_PX,
            size=cfg.INPUT.GLOBAL_CROPS.SIZE_PX[0],
            drop_rate=cfg.MODEL.VIT.DROP_PATH_RATE,
            num_prototypes=cfg.MODEL.DINO_HEAD.NUM_PROTOTYPES,
        ).to(cfg.MODEL.DEVICE)
        assert batch.masks is not None
        self.crops = _normalised(cfg, batch)
        self.masks = batch.masks.to(cfg.MODEL.DEVICE)
        # Its loader pads to the largest number of patches that the mask ratios allow, about 1.08 of those masked here.
        self.upper_bound = int(batch.masks.sum() * 1.08)

    def __call__(self) -> float:
        self.step.train()
        self.step.teacher.eval()
        return sum(self.step(*self.crops, self.masks, self.upper_bound).values())


class OurBackbone:
    """Forward and backward of the backbone alone on all crops, without stochastic depth."""

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        self.backbone = build_backbone(cfg, for_teacher=True).to(cfg.MODEL.DEVICE).train()
        self.crops = _normalised(cfg, batch)

    def __call__(self) -> float:
        self.backbone.zero_grad(set_to_none=True)
        outputs = self.backbone.forward_views(list(self.crops), [None] * len(self.crops))
        loss = sum((o.cls_token.mean() + o.patch_tokens.mean() for o in outputs), torch.zeros(()))
        loss.backward()
        return float(loss.detach())


class TimmBackbone:
    """The same with timm's model of the same size."""

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        from timm.models.vision_transformer import VisionTransformer

        size = VIT_SIZES[cfg.MODEL.VIT.SIZE]
        self.backbone = VisionTransformer(
            img_size=cfg.INPUT.GLOBAL_CROPS.SIZE_PX[0],
            patch_size=cfg.MODEL.VIT.PATCH_SIZE_PX,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
            init_values=cfg.MODEL.VIT.LAYER_SCALE_INIT,
            **size._asdict(),
        ).to(cfg.MODEL.DEVICE)
        self.crops = _normalised(cfg, batch)

    def __call__(self) -> float:
        self.backbone.zero_grad(set_to_none=True)
        outputs = [self.backbone(crops) for crops in self.crops]
        loss = sum((o[:, 0].mean() + o[:, 1:].mean() for o in outputs), torch.zeros(()))
        loss.backward()
        return float(loss.detach())


class MatrixProduct:
    """One product of square float32 matrices: the rate that the others are held against."""

    SIZE = 2048

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        self.a, self.b = (torch.randn(self.SIZE, self.SIZE, device=cfg.MODEL.DEVICE) for _ in range(2))

    def __call__(self) -> float:
        return float((self.a @ self.b)[0, 0])


CONTENDERS = {
    "ours": OurStep,
    "ours compiled": OurCompiledStep,
    "published": Published,
    "our backbone": OurBackbone,
    "timm backbone": TimmBackbone,
    "matrix product": MatrixProduct,
}


def _normalised(cfg: CfgNode, batch: SSLBatch) -> tuple[torch.Tensor, torch.Tensor]:
    assert batch.local_crops is not None
    norm = PixelNorm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD).to(cfg.MODEL.DEVICE)
    return norm(batch.global_crops.to(cfg.MODEL.DEVICE)), norm(batch.local_crops.to(cfg.MODEL.DEVICE))
