"""timm's ``VisionTransformer`` (vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2)."""

from __future__ import annotations

import torch

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.layouts.layout import Hints, Layout, is_state_dict
from dinoengine.checkpoint.weights import Weights

# SwiGLU has the names of the plain MLP there.
_SWIGLU = {"mlp.fc1.": "mlp.w12.", "mlp.fc2.": "mlp.w3."}


class Timm(Layout):
    """Our names, but: registers are ``reg_token``; with registers the CLS token has its position added to it."""

    name = "timm"
    description = "timm VisionTransformer (for timm.create_model(..., checkpoint_path=))"
    never_stores = ("mask_token",)

    def detect(self, content: FileContent) -> bool:
        data = content.data
        is_vit = is_state_dict(data) and {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= data.keys()
        return is_vit and "mask_token" not in data and ("reg_token" in data or "blocks.0.ls1.gamma" in data)

    def read(self, content: FileContent, hints: Hints) -> Weights:
        entries: StateDict = dict(content.data)
        if not {"cls_token", "pos_embed"} <= entries.keys():
            raise CheckpointError(
                f"{content.path} has no CLS token and position table, so it is no timm ViT of this kind."
            )
        if "reg_token" in entries:
            entries["register_tokens"] = entries.pop("reg_token")
            table = entries["pos_embed"]
            entries["pos_embed"] = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
        if _is_swiglu(entries):
            for theirs, ours in _SWIGLU.items():
                entries = {name.replace(theirs, ours): value for name, value in entries.items()}
        return make_weights(
            self.name,
            content.path,
            {"backbone": entries},
            antialias=True,
            offset=0.0,
            num_heads=hints.num_heads,
            table_grid=hints.table_grid,
            optional=self.never_stores,
        )

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        entries = dict(weights.backbone)
        lost = [name for name in self.never_stores if entries.pop(name, None) is not None]
        if "register_tokens" in entries:
            entries["reg_token"] = entries.pop("register_tokens")
            entries["cls_token"] = entries["cls_token"] + entries["pos_embed"][:, :1]
            entries["pos_embed"] = entries["pos_embed"][:, 1:].clone()
        for theirs, ours in _SWIGLU.items():
            entries = {name.replace(ours, theirs): value for name, value in entries.items()}
        lost += [f"{part}.{name}" for part in weights.parts if part != "backbone" for name in weights.parts[part]]
        return FileContent("", entries), lost


def _is_swiglu(entries: StateDict) -> bool:
    """Whether the first layer is twice as wide as what the second takes."""
    first, second = entries.get("blocks.0.mlp.fc1.weight"), entries.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]
