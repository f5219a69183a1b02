"""What the rest of the engine asks of a backbone."""

from __future__ import annotations

import abc

from torch import Tensor, nn

from dinoengine.structures import BackboneOutput, ParamFacts, PickedTokens


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

        A backbone may override it with something faster.
        """
        return [self(x, mask) for x, mask in zip(images, masks, strict=True)]

    def pick_tokens(
        self, images: list[Tensor], masks: list[Tensor | None], patches: list[Tensor | None]
    ) -> list[PickedTokens]:
        """CLS tokens and some patch tokens of several batches of crops; what a training step needs.

        A backbone may override it to leave out what nobody asked for; the result is the same.

        Args:
            patches: for each batch [M] int64, indices into its B * N patches; None: no patch.
        """
        picked = []
        for output, rows in zip(self.forward_views(images, masks), patches, strict=True):
            tokens = output.patch_tokens.flatten(0, 1)
            picked.append(PickedTokens(output.cls_token, tokens[:0] if rows is None else tokens.index_select(0, rows)))
        return picked

    def disable_masking(self) -> None:
        """Called when no loss uses masks: a mask token would be a parameter without gradient, which DDP refuses."""
        return None

    @abc.abstractmethod
    def param_facts(self, name: str) -> ParamFacts:
        """Facts about the parameter called ``name`` in ``named_parameters()``."""
