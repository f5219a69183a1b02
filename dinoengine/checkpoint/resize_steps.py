"""One change of a model's shape at a time: channels, patch, positions, registers. Every entry but one is passed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dinoengine.checkpoint.patch_kernel import mix_channels, resample_kernel
from dinoengine.checkpoint.weights import BackboneSpec, Weights, is_backbone
from dinoengine.config import cfg_from_text
from dinoengine.config.pixels import NUM_CHANNELS, assumed_format
from dinoengine.modeling.layers.position import interpolate_position_table

# Initial registers, as VisionTransformer's own: so small that only training gives them a meaning.
_REGISTER_STD = 1e-6


def with_channels(weights: Weights, in_chans: int) -> Weights:
    """The patch embedding for another number of channels; see ``mix_channels``."""
    spec = replace(weights.spec, in_chans=in_chans)
    mixed = _mapped(weights, spec, "patch_embed.proj.weight", lambda kernel: mix_channels(kernel, in_chans))
    return replace(mixed, config=_config_for_channels(weights.config, in_chans))


def with_patch_size(weights: Weights, patch_size: int) -> Weights:
    """The patch embedding for another patch size; as many positions, so the image size changes with it."""
    spec = replace(weights.spec, patch_size=patch_size)
    return _mapped(weights, spec, "patch_embed.proj.weight", lambda kernel: resample_kernel(kernel, patch_size))


def with_table_grid(weights: Weights, grid: tuple[int, int]) -> Weights:
    """The position table that the model would interpolate to ``grid`` (rows, columns) patches, as its own."""
    old = weights.spec

    def resampled(table: Tensor) -> Tensor:
        return interpolate_position_table(
            table, old.table_grid, grid, antialias=old.interpolate_antialias, offset=old.interpolate_offset
        )

    return _mapped(weights, replace(old, table_grid=grid), "pos_embed", resampled)


def with_registers(weights: Weights, num_registers: int) -> Weights:
    """Registers added behind those there are: the same for student and teacher, and in every call."""
    num_new = num_registers - weights.spec.num_register_tokens
    shape = (1, num_new, weights.spec.embed_dim)
    added = _REGISTER_STD * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec = replace(weights.spec, num_register_tokens=num_registers)
    if weights.spec.num_register_tokens:
        return _mapped(weights, spec, "register_tokens", lambda tokens: torch.cat((tokens, added), dim=1))
    parts = {
        part: {**entries, "register_tokens": added.to(entries["cls_token"].dtype)} if is_backbone(part) else entries
        for part, entries in weights.parts.items()
    }
    return replace(weights, spec=spec, parts=parts)


def _mapped(weights: Weights, spec: BackboneSpec, name: str, change: Callable[[Tensor], Tensor]) -> Weights:
    """``change`` applied in float32 to one entry of every backbone."""
    parts = {
        part: {n: change(v.float()) if n == name and is_backbone(part) else v for n, v in entries.items()}
        for part, entries in weights.parts.items()
    }
    return replace(weights, spec=spec, parts=parts)


def _config_for_channels(text: str | None, in_chans: int) -> str | None:
    """Pixel statistics that go with the channels: repeated cyclically, their mean where there is one channel."""
    if text is None:
        return None
    cfg = cfg_from_text(text)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        mean = (sum(values) / len(values),)
        cfg.MODEL[key] = mean if in_chans == 1 else tuple(values[i % len(values)] for i in range(in_chans))
    if NUM_CHANNELS.get(cfg.INPUT.FORMAT, in_chans) != in_chans:
        cfg.merge_from_list([word for pair in assumed_format(in_chans).items() for word in pair])
    return str(cfg.dump())
