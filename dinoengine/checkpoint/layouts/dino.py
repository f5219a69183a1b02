"""Files of DINO (the first) and of iBOT: backbones without LayerScale, full training checkpoints of DINO."""

from __future__ import annotations

from typing import Any

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.layouts.layout import Hints, Layout, is_state_dict, strip_prefix
from dinoengine.checkpoint.layouts.meta import published_interpolation
from dinoengine.checkpoint.weights import Weights

# What a file keeps its state dict in; the teacher's comes first where there are both.
_WRAPPERS = ("teacher", "state_dict", "student")
# What their trainings keep beside the models.
_OF_THE_TRAINING = ("optimizer", "epoch", "args", "fp16_scaler")


def _wrapper(data: dict[str, Any]) -> str:
    """The entry that holds the backbone; "" if the file itself does."""
    return next((name for name in _WRAPPERS if is_state_dict(data.get(name))), "")


def _entries(data: dict[str, Any], wrapper: str) -> StateDict:
    """The state dict inside a file, without the prefixes of DDP and multi-crop."""
    inner = data[wrapper] if wrapper else data
    if not is_state_dict(inner):
        return {}
    return {name.removeprefix("module.").removeprefix("backbone."): value for name, value in inner.items()}


class Dino(Layout):
    """Our names without LayerScale and mask token; positions are interpolated as in DINOv2 without registers."""

    name = "dino"
    description = "DINO (2021) backbone (dino_deitsmall16_pretrain.pth) or its training checkpoint"
    never_stores: tuple[str, ...] = ("mask_token",)

    def detect(self, content: FileContent) -> bool:
        entries = _entries(content.data, _wrapper(content.data))
        return (
            {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= entries.keys()
            and "blocks.0.ls1.gamma" not in entries
            and not {"mask_token", "masked_embed", "reg_token"} & entries.keys()
        )

    def read(self, content: FileContent, hints: Hints) -> Weights:
        data = content.data
        wrapper = _wrapper(data)
        entries = _entries(data, wrapper)
        if not entries:
            raise CheckpointError(f"{content.path} holds no state dict of this layout.")
        parts, unused = self._parts(entries)
        read = {wrapper}
        if wrapper == "teacher" and is_state_dict(data.get("student")):
            read.add("student")
            student, unused_there = self._parts(_entries(data, "student"))
            parts |= {f"student.{part}": of_part for part, of_part in student.items()}
            unused += [f"student.{name}" for name in unused_there]
        if "dino_head" in parts and is_state_dict(loss := data.get("dino_loss")) and loss.keys() == {"center"}:
            read.add("dino_loss")
            parts["centers"] = {"dino": loss["center"]}
        beside = [name for name in data if name not in read] if wrapper else []
        antialias, offset = published_interpolation(0)
        return make_weights(
            self.name,
            content.path,
            parts,
            antialias=antialias,
            offset=offset,
            num_heads=hints.num_heads,
            table_grid=hints.table_grid,
            optional=self.never_stores,
            unused=unused + [name for name in beside if name not in _OF_THE_TRAINING],
            left_out=[name for name in beside if name in _OF_THE_TRAINING],
        )

    def _parts(self, entries: StateDict) -> tuple[dict[str, StateDict], list[str]]:
        """Backbone and, if its head is a projection head, that; and what is neither."""
        head = strip_prefix(entries, "head.")
        parts = {"backbone": self.to_ours({n: v for n, v in entries.items() if not n.startswith("head.")})}
        if any(name.startswith("last_layer") for name in head):
            parts["dino_head"] = {n: v for n, v in head.items() if n.startswith(("mlp.", "last_layer."))}
        return parts, [f"head.{name}" for name in head if name not in parts.get("dino_head", ())]

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
        entries = _entries(content.data, _wrapper(content.data))
        return "masked_embed" in entries and "blocks.0.attn.qkv.weight" in entries

    def to_ours(self, entries: StateDict) -> StateDict:
        return {"mask_token" if name == "masked_embed" else name: value for name, value in entries.items()}

    def to_theirs(self, entries: StateDict) -> StateDict:
        return {"masked_embed" if name == "mask_token" else name: value for name, value in entries.items()}
