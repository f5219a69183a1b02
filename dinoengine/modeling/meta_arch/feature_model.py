"""Images in, features out: what evaluation and prediction run."""

from __future__ import annotations

from torch import Tensor, nn

from dinoengine.modeling.backbone.backbone import Backbone
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.structures import BackboneOutput


class FeatureModel(nn.Module):
    """Pixel normalisation and a backbone."""

    def __init__(self, pixel_norm: PixelNorm, backbone: Backbone) -> None:
        super().__init__()
        self.pixel_norm = pixel_norm
        self.backbone = backbone

    def forward(self, images: Tensor) -> BackboneOutput:
        """[B, C, H, W] uint8, or float in 0..1 -> tokens after the final norm."""
        return self.backbone(self.pixel_norm(images))
