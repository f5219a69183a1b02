"""Images in, features out: what evaluation and prediction run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dinoengine.modeling.backbone.backbone import Backbone
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.structures import BackboneOutput


@dataclass(frozen=True)
class PrototypeHead:
    """How a teacher assigns images to its prototypes.

    Attributes:
        probabilities: [B, D] CLS tokens -> [B, K], at least fp32, each row sums to 1, at ``temp()``; K prototypes.
        temp: the teacher's temperature as it is now.
    """

    probabilities: Callable[[Tensor], Tensor]
    temp: Callable[[], float]


class FeatureModel(nn.Module):
    """Pixel normalisation and a backbone.

    Attributes:
        prototype_head: what the model of the backbone makes of its CLS tokens, or None for a bare backbone. It is no
            part of this module: neither of its state dict nor of its hash.
    """

    def __init__(self, pixel_norm: PixelNorm, backbone: Backbone, prototype_head: PrototypeHead | None = None) -> None:
        super().__init__()
        self.pixel_norm = pixel_norm
        self.backbone = backbone
        self.prototype_head = prototype_head

    def forward(self, images: Tensor) -> BackboneOutput:
        """[B, C, H, W] uint8, or float in 0..1 -> tokens after the final norm."""
        return self.backbone(self.pixel_norm(images))
