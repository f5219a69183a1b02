"""What the rest of the engine asks of a backbone."""

from __future__ import annotations

import abc

from torch import Tensor, nn

from dinoengine.structures import BackboneOutput, ParamFacts


class Backbone(nn.Module, abc.ABC):
    """An encoder of images into one CLS token, registers and patch tokens.

    Attributes:
        embed_dim: feature width D.
        patch_size: edge of a patch in pixels.
        num_layers: number of blocks, for layer-wise LR decay.
    """

    embed_dim: int
    patch_size: int
    num_layers: int

    @abc.abstractmethod
    def forward(self, images: Tensor, masks: Tensor | None = None) -> BackboneOutput:
        """
        Args:
            images: [B, C, H, W] float32, normalised.
            masks: [B, N] bool, True where a patch is replaced by the mask token; None masks nothing.
        """

    def forward_views(self, images: list[Tensor], masks: list[Tensor | None]) -> list[BackboneOutput]:
        """Several batches of crops of different sizes; equal to one ``forward`` for each.

        A backbone may override it with something faster (packing the crops into one sequence).
        """
        return [self(x, mask) for x, mask in zip(images, masks, strict=True)]

    def disable_masking(self) -> None:
        """Called when no loss uses masks: a mask token would be a parameter without gradient, which DDP refuses."""
        return None

    @abc.abstractmethod
    def param_facts(self, name: str) -> ParamFacts:
        """Facts about the parameter called ``name`` in ``named_parameters()``."""
