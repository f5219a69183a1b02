"""Cerebras ModelZoo's DINOv2: teacher and student trunks, heads and centres in one flat dict under "model"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.layouts.layout import (
    Hints,
    Layout,
    Rule,
    add_prefix,
    is_state_dict,
    rename_to_ours,
    rename_to_theirs,
    strip_prefix,
)
from dinoengine.checkpoint.layouts.meta import published_interpolation
from dinoengine.checkpoint.weights import Weights

_TRUNKS = {"backbone": "image_model_trunks.model.0.", "student.backbone": "image_model_trunks.model.1."}
_HEADS = {
    "dino_head": "heads.model.0.",
    "student.dino_head": "heads.model.1.",
    "ibot_head": "heads.model.2.",
    "student.ibot_head": "heads.model.3.",
}
_CENTERS = {"dino": "losses.model.0.center", "ibot": "losses.model.1.center"}
# Counters of its schedules; conversion starts them anew.
_COUNTERS = ("ema_step", "losses.model.0.step", "losses.model.1.step")
# Recomputed by its model from the image sizes.
_DERIVED = "embedding_layer.interpolation_matrix"


def _patches_out(weight: Tensor) -> Tensor:
    """[D, C, p, p] -> [D, p * p * C]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _positions_out(table: Tensor) -> Tensor:
    """[1, 1 + N, D], CLS first -> [N + 1, D], CLS last."""
    return torch.cat((table[0, 1:], table[0, :1]))


def _positions_in(table: Tensor) -> Tensor:
    return torch.cat((table[-1:], table[:-1])).unsqueeze(0)


def _rules(patch_size: int) -> tuple[Rule, ...]:
    def patches_in(weight: Tensor) -> Tensor:
        return weight.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).contiguous()

    layer = "encoder.transformer_encoder.layers.{i}."
    return (
        Rule("cls_token", "embedding_layer.cls_embedding", lambda t: t.flatten(), lambda t: t.view(1, 1, -1)),
        Rule("mask_token", "embedding_layer.mask_token", lambda t: t.flatten(), lambda t: t.view(1, -1)),
        Rule("pos_embed", "embedding_layer.position_embeddings.weight", _positions_out, _positions_in),
        Rule("patch_embed.proj.weight", "embedding_layer.linear_proj.weight", _patches_out, patches_in),
        Rule("patch_embed.proj.bias", "embedding_layer.linear_proj.bias"),
        Rule("blocks.{i}.norm1", layer + "norm1"),
        Rule("blocks.{i}.attn.qkv", tuple(f"{layer}self_attn.proj_{part}_dense_layer" for part in "qkv")),
        Rule("blocks.{i}.attn.proj", layer + "self_attn.proj_output_dense_layer"),
        Rule("blocks.{i}.ls1.gamma", layer + "layer_scale1"),
        Rule("blocks.{i}.norm2", layer + "norm2"),
        Rule("blocks.{i}.mlp.fc1", layer + "ffn.ffn.0.linear_layer"),
        Rule("blocks.{i}.mlp.fc2", layer + "ffn.ffn.1.linear_layer"),
        Rule("blocks.{i}.ls2.gamma", layer + "layer_scale2"),
        Rule("norm", "encoder.transformer_encoder.norm"),
    )


class Cerebras(Layout):
    """Its patch embedding is a linear layer over (row, column, channel), its position table has CLS last."""

    name = "cerebras"
    is_nested = True
    description = "Cerebras ModelZoo DINOv2 checkpoint (teacher, student, heads, centres)"

    def detect(self, content: FileContent) -> bool:
        return any(name.startswith("image_model_trunks.model.") for name in _model(content))

    def read(self, content: FileContent, hints: Hints) -> Weights:
        model = _model(content)
        weight = model.get("image_model_trunks.model.0.embedding_layer.linear_proj.weight")
        if weight is None:
            raise CheckpointError(f"{content.path} has no teacher trunk (image_model_trunks.model.0).")
        # The layer states p * p * C inputs alone; every published config has three channels.
        patch_size = math.isqrt(weight.shape[1] // 3)
        if 3 * patch_size**2 != weight.shape[1]:
            raise CheckpointError(
                f"The patch embedding of {content.path} has {weight.shape[1]} inputs, not 3 channels of a square patch."
            )
        rules = _rules(patch_size)
        parts: dict[str, StateDict] = {}
        unused = [
            name
            for name in model
            if not name.startswith((*_TRUNKS.values(), *_HEADS.values()))
            and name not in (*_CENTERS.values(), *_COUNTERS)
        ]
        for part, prefix in _TRUNKS.items():
            if entries := strip_prefix(model, prefix):
                entries.pop(_DERIVED, None)
                parts[part], unknown = rename_to_ours(entries, rules, content.path)
                unused += [prefix + name for name in unknown]
        parts |= {part: entries for part, prefix in _HEADS.items() if (entries := strip_prefix(model, prefix))}
        if centers := {name: model[key].view(1, -1) for name, key in _CENTERS.items() if key in model}:
            parts["centers"] = centers
        antialias, offset = published_interpolation(0)
        return make_weights(
            self.name,
            content.path,
            parts,
            antialias=antialias,
            offset=offset,
            num_heads=hints.num_heads,
            table_grid=hints.table_grid,
            unused=unused,
            left_out=[name for name in content.data if name != "model"] if "model" in content.data else [],
        )

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        spec = weights.spec
        if spec.in_chans != 3:
            raise CheckpointError(
                f"The cerebras layout cannot hold {spec.describe()}: it has {spec.in_chans} channels, not 3."
            )
        model: StateDict = {}
        lost = []
        for part, entries in weights.parts.items():
            if part in _TRUNKS:
                theirs, unknown = rename_to_theirs(entries, _rules(spec.patch_size))
                model |= add_prefix(theirs, _TRUNKS[part])
                lost += [part.removesuffix("backbone") + name for name in unknown]
            elif part in _HEADS:
                model |= add_prefix(entries, _HEADS[part])
            elif part == "centers":
                model |= {_CENTERS[name]: center.flatten() for name, center in entries.items()}
            else:
                lost += [f"{part}.{name}" for name in entries]
        if "centers" in weights.parts:
            model |= {name: torch.zeros(1, dtype=torch.int32) for name in _COUNTERS}
        return FileContent("", {"model": model}), lost


def _model(content: FileContent) -> StateDict:
    inner = content.data.get("model", content.data)
    return inner if is_state_dict(inner) else {}
