"""An image classifier: one linear layer on a backbone, frozen (linear evaluation) or not (full fine-tuning)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode, configurable
from dinoengine.modeling.backbone import Backbone, build_backbone
from dinoengine.modeling.build import META_ARCH_REGISTRY
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch.feature_model import FeatureModel, last_outputs
from dinoengine.modeling.meta_arch.mixing import BatchMixing
from dinoengine.structures import BackboneOutput, ClassifierOutput, ImageBatch, LossTerm, LossTerms, ParamFacts

_HEAD_INIT_STD = 0.01  # that of DINOv2's linear evaluation


def head_input(outputs: list[BackboneOutput], mean_patch: bool) -> Tensor:
    """The CLS tokens of these blocks side by side, then (``mean_patch``) the mean patch token of the last one.

    Returns:
        [B, (len(outputs) + mean_patch) * D], in the order of the published linear heads.
    """
    parts = [output.cls_token for output in outputs]
    if mean_patch:
        parts.append(outputs[-1].patch_tokens.mean(1))
    return torch.cat(parts, dim=1)


class ClassifierFeatureModel(FeatureModel):
    """Pixel normalisation, backbone and head."""

    def __init__(
        self, pixel_norm: PixelNorm, backbone: Backbone, head: nn.Linear, num_last_blocks: int, mean_patch: bool
    ) -> None:
        super().__init__(pixel_norm, backbone)
        self.head = head
        self.num_last_blocks = num_last_blocks
        self.mean_patch = mean_patch

    def forward(self, images: Tensor) -> ClassifierOutput:
        """[B, C, H, W] uint8, or float in 0..1 -> tokens after the final norm, and logits."""
        outputs = last_outputs(self.backbone, self.pixel_norm(images), self.num_last_blocks)
        return ClassifierOutput(**vars(outputs[-1]), logits=self.head(head_input(outputs, self.mean_patch)))


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Cross entropy of a linear head on the tokens of a backbone.

    Its state dict is ``backbone.*``, ``head.weight`` and ``head.bias``. A frozen backbone stays in eval mode, gets no
    gradient and is in no parameter group.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_norm: PixelNorm,
        num_classes: int,
        num_last_blocks: int = 1,
        mean_patch: bool = False,
        freeze_backbone: bool = True,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        """
        Args:
            num_last_blocks: blocks whose CLS tokens the head sees.
            mean_patch: whether it sees the mean patch token of the last block, too.
            label_smoothing: share of the target that is spread over all classes; of mixed targets as of plain ones.
            mixup_alpha, cutmix_alpha: see ``BatchMixing``; 0: off.

        Raises:
            ValueError: if there is no class, or the backbone has not that many blocks to show.
        """
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"A classifier needs MODEL.CLASSIFIER.NUM_CLASSES of at least 1, got {num_classes}.")
        if num_last_blocks > 1 and not hasattr(backbone, "get_intermediate_layers"):
            raise ValueError(
                f"{type(backbone).__name__} gives the tokens of its last block only (it has no get_intermediate_layers); "
                "set MODEL.CLASSIFIER.NUM_LAST_BLOCKS 1."
            )
        if not 1 <= num_last_blocks <= backbone.num_layers:
            raise ValueError(
                f"MODEL.CLASSIFIER.NUM_LAST_BLOCKS is {num_last_blocks}, and the backbone has {backbone.num_layers} blocks."
            )
        self.pixel_norm = pixel_norm
        self.backbone = backbone
        self.head = nn.Linear((num_last_blocks + mean_patch) * backbone.embed_dim, num_classes)
        self.num_last_blocks = num_last_blocks
        self.mean_patch = mean_patch
        self.freeze_backbone = freeze_backbone
        self.label_smoothing = label_smoothing
        self.mixing = BatchMixing(num_classes, mixup_alpha, cutmix_alpha) if mixup_alpha or cutmix_alpha else None
        self.backbone.disable_masking()
        if freeze_backbone:
            self.backbone.requires_grad_(False)
        nn.init.normal_(self.head.weight, std=_HEAD_INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        classifier = cfg.MODEL.CLASSIFIER
        return {
            "backbone": build_backbone(cfg),
            "pixel_norm": PixelNorm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD),
            "num_classes": classifier.NUM_CLASSES,
            "num_last_blocks": classifier.NUM_LAST_BLOCKS,
            "mean_patch": classifier.MEAN_PATCH,
            "freeze_backbone": classifier.FREEZE_BACKBONE,
            "label_smoothing": classifier.LABEL_SMOOTHING,
            "mixup_alpha": classifier.MIXUP_ALPHA,
            "cutmix_alpha": classifier.CUTMIX_ALPHA,
        }

    def train(self, mode: bool = True) -> ImageClassifier:
        """As ``nn.Module.train``, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def split_batch(self, batch: ImageBatch, num_parts: int) -> list[ImageBatch]:
        """Micro-batches, mixed before they are cut apart: as one batch would be, with the same draws."""
        return self._mixed(batch).split(num_parts)

    def forward(self, batch: ImageBatch) -> LossTerms:
        """Cross entropy in fp32, and the share of right answers (``train_top1``, percent).

        In training the batch is mixed first, if it is not yet. A mixed image has two right answers, so there is no
        ``train_top1`` then.

        Raises:
            ValueError: if the batch has no labels.
        """
        batch = self._mixed(batch)
        assert batch.labels is not None
        pixels = self.pixel_norm(batch.images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            outputs = last_outputs(self.backbone, pixels, self.num_last_blocks)
        logits = self.head(head_input(outputs, self.mean_patch)).float()  # [B, classes]
        loss = LossTerm(
            "cross_entropy", F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing), 1.0
        )
        per_image = None
        if batch.sources is not None:
            per_image = F.cross_entropy(
                logits.detach(), batch.labels, label_smoothing=self.label_smoothing, reduction="none"
            )
        if batch.labels.ndim == 2:
            return LossTerms([loss], per_image=per_image)
        top1 = 100.0 * (logits.detach().argmax(1) == batch.labels).float().mean()
        return LossTerms([loss], {"train_top1": top1}, per_image)

    def _mixed(self, batch: ImageBatch) -> ImageBatch:
        if batch.labels is None:
            raise ValueError("A classifier is trained with labels, and this batch has none.")
        is_mixed = batch.labels.ndim == 2
        return batch if self.mixing is None or is_mixed or not self.training else self.mixing(batch)

    def param_facts(self, name: str) -> ParamFacts:
        """The backbone's own facts; of the head the weight is decayed, at the full LR."""
        part, rest = name.split(".", 1)
        if part == "backbone":
            return replace(self.backbone.param_facts(rest), in_backbone=True)
        return ParamFacts(weight_decay=rest == "weight")

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Backbone (unless it is frozen) and head are clipped on their own."""
        groups = {"backbone": self.backbone, "head": self.head}
        trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in groups.items()}
        return {name: parameters for name, parameters in trained.items() if parameters}

    def feature_model(self) -> ClassifierFeatureModel:
        """Images -> tokens and logits, sharing the parameters."""
        return ClassifierFeatureModel(self.pixel_norm, self.backbone, self.head, self.num_last_blocks, self.mean_patch)
