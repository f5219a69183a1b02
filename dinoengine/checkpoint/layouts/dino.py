"""Files of DINO (the first) and of iBOT: backbones without LayerScale, full training checkpoints of DINO."""

from __future__ import annotations

from typing import Any

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict
from dinoengine.checkpoint.layouts.layout import Hints, Layout, is_state_dict, strip_prefix
from dinoengine.checkpoint.weights import Weights, make_weights

_WRAPPERS = ("teacher", "state_dict", "student")


def _entries(data: dict[str, Any]) -> StateDict:
    """The state dict inside a file: the teacher's where there is one; without the prefixes of DDP and multi-crop."""
    inner = next((data[name] for name in _WRAPPERS if is_state_dict(data.get(name))), data)
    if not is_state_dict(inner):
        return {}
    return {name.removeprefix("module.").removeprefix("backbone."): value for name, value in inner.items()}


class Dino(Layout):
    """Our names without LayerScale and mask token; positions are interpolated as in DINOv2 without registers."""

    name = "dino"
    description = "DINO (2021) backbone (dino_deitsmall16_pretrain.pth) or its training checkpoint"
    never_stores: tuple[str, ...] = ("mask_token",)

    def detect(self, content: FileContent) -> bool:
        entries = _entries(content.data)
        return (
            {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= entries.keys()
            and "blocks.0.ls1.gamma" not in entries
            and not {"mask_token", "masked_embed", "reg_token"} & entries.keys()
        )

    def read(self, content: FileContent, hints: Hints) -> Weights:
        entries = _entries(content.data)
        if not entries:
            raise CheckpointError(f"{content.path} holds no state dict of this layout.")
        head = strip_prefix(entries, "head.")
        backbone = {name: value for name, value in entries.items() if not name.startswith("head.")}
        parts = {"backbone": self.to_ours(backbone)}
        unused = []
        if any(name.startswith("last_layer") for name in head):
            parts["dino_head"] = {n: v for n, v in head.items() if n.startswith(("mlp.", "last_layer."))}
            unused = [f"head.{name}" for name in head if name not in parts["dino_head"]]
        else:
            unused = [f"head.{name}" for name in head]
        return make_weights(
            self.name,
            content.path,
            parts,
            antialias=False,
            offset=0.1,
            num_heads=hints.num_heads,
            table_grid=hints.table_grid,
            optional=self.never_stores,
            unused=unused,
        )

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        spec = weights.spec
        has = {"LayerScale": spec.layer_scale, "registers": spec.num_register_tokens, "SwiGLU": spec.ffn == "swiglu"}
        if extra := [name for name, is_there in has.items() if is_there]:
            raise CheckpointError(
                f"The {self.name} layout cannot hold {spec.describe()}: it has no {' and no '.join(extra)}."
            )
        stored = {n: v for n, v in weights.backbone.items() if n not in self.never_stores}
        lost = [n for n in weights.backbone if n not in stored]
        lost += [f"{part}.{name}" for part in weights.parts if part != "backbone" for name in weights.parts[part]]
        return FileContent("", self.to_theirs(stored)), lost

    def to_ours(self, entries: StateDict) -> StateDict:
        return entries

    def to_theirs(self, entries: StateDict) -> StateDict:
        return entries


class IBot(Dino):
    """As DINO, with the mask token under another name (in the student's files)."""

    name = "ibot"
    description = "iBOT backbone (checkpoint_teacher.pth, checkpoint_student.pth)"
    never_stores = ()

    def detect(self, content: FileContent) -> bool:
        entries = _entries(content.data)
        return "masked_embed" in entries and "blocks.0.attn.qkv.weight" in entries

    def to_ours(self, entries: StateDict) -> StateDict:
        return {"mask_token" if name == "masked_embed" else name: value for name, value in entries.items()}

    def to_theirs(self, entries: StateDict) -> StateDict:
        return {"masked_embed" if name == "mask_token" else name: value for name, value in entries.items()}
