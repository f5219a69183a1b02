"""Images in, features out: what evaluation and prediction run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dinoengine.modeling.backbone.backbone import Backbone
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.structures import BackboneOutput


def last_outputs(backbone: Backbone, pixels: Tensor, num_blocks: int) -> list[BackboneOutput]:
    """Tokens of the last ``num_blocks`` blocks, each after the final norm, oldest first."""
    if num_blocks == 1:
        return [backbone(pixels)]
    outputs: list[BackboneOutput] = backbone.get_intermediate_layers(pixels, num_blocks)  # type: ignore[operator]
    return outputs


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

    def forward_features(self, images: Tensor) -> BackboneOutput:
        """The same as calling the model, under the name that published code uses."""
        output: BackboneOutput = self(images)
        return output

    def forward_last_blocks(self, images: Tensor, num_blocks: int) -> list[BackboneOutput]:
        """[B, C, H, W] as in ``forward`` -> tokens of the last blocks, each after the final norm, oldest first.

        Raises:
            ValueError: if the backbone has not that many blocks, or shows only its last one.
        """
        if num_blocks > 1 and not hasattr(self.backbone, "get_intermediate_layers"):
            raise ValueError(
                f"{type(self.backbone).__name__} gives the tokens of its last block only; got {num_blocks}."
            )
        if not 1 <= num_blocks <= self.backbone.num_layers:
            raise ValueError(f"The backbone has {self.backbone.num_layers} blocks; got the last {num_blocks}.")
        return last_outputs(self.backbone, self.pixel_norm(images), num_blocks)
