"""Files of Meta's DINOv2: hub backbones, teacher checkpoints of a training (also with block chunks), linear heads."""

from __future__ import annotations

import re

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.layouts.layout import Hints, Layout, add_prefix, is_state_dict, strip_prefix
from dinoengine.checkpoint.weights import Weights

HEADS = ("dino_head", "ibot_head")


def published_interpolation(num_registers: int) -> tuple[bool, float]:
    """(antialias, offset) that the published models were trained with; their files do not say."""
    return (True, 0.0) if num_registers else (False, 0.1)


def without_chunks(entries: StateDict) -> StateDict:
    """``blocks.{chunk}.{block}.x`` -> ``blocks.{block}.x``: the second number is the block, counted over all chunks."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in entries.items()}


def with_chunks(entries: StateDict, depth: int, num_chunks: int) -> StateDict:
    """The inverse of ``without_chunks``, in chunks of depth // num_chunks blocks (one more chunk if that leaves some)."""
    size = depth // num_chunks

    def chunked(match: re.Match[str]) -> str:
        return f"blocks.{int(match[1]) // size}.{match[1]}."

    return {re.sub(r"^blocks\.(\d+)\.", chunked, name): value for name, value in entries.items()}


class MetaBackbone(Layout):
    """Our names are theirs: a flat dict."""

    name = "meta"
    description = "Meta's hub backbone (dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth)"

    def detect(self, content: FileContent) -> bool:
        return is_state_dict(content.data) and {"cls_token", "pos_embed", "mask_token"} <= content.data.keys()

    def read(self, content: FileContent, hints: Hints) -> Weights:
        return read_backbone(self.name, content.path, {"backbone": without_chunks(content.data)}, hints)

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        lost = [f"{part}.{name}" for part in weights.parts if part != "backbone" for name in weights.parts[part]]
        return FileContent("", dict(weights.backbone)), lost


class MetaTeacher(Layout):
    """``{"teacher": {"backbone.x", "dino_head.x", "ibot_head.x"}}``, written by Meta's training at every evaluation."""

    name = "meta-teacher"
    is_nested = True
    description = "Meta's teacher_checkpoint.pth: the teacher's backbone and heads"

    def detect(self, content: FileContent) -> bool:
        teacher = content.data.get("teacher")
        if not is_state_dict(teacher):
            return False
        tops = {name.removeprefix("module.").partition(".")[0] for name in teacher}
        # DINO and iBOT name their backbone alike, but have one head that is called so.
        return "backbone" in tops and ("head" not in tops or "dino_head" in tops)

    def read(self, content: FileContent, hints: Hints) -> Weights:
        if "teacher" not in content.data:
            raise CheckpointError(f"{content.path} has no 'teacher' entry, so it is no teacher checkpoint.")
        teacher = {name.removeprefix("module."): value for name, value in content.data["teacher"].items()}
        parts = {"backbone": without_chunks(strip_prefix(teacher, "backbone."))}
        parts |= {head: entries for head in HEADS if (entries := strip_prefix(teacher, f"{head}."))}
        unused = [name for name in teacher if not name.startswith(tuple(f"{p}." for p in ("backbone", *HEADS)))]
        unused += [name for name in content.data if name != "teacher"]
        return read_backbone(self.name, content.path, parts, hints, unused)

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        teacher = {}
        lost = []
        for part, entries in weights.parts.items():
            if part in ("backbone", *HEADS):
                teacher.update(add_prefix(entries, f"{part}."))
            else:
                lost += [f"{part}.{name}" for name in entries]
        return FileContent("", {"teacher": teacher}), lost


def read_backbone(
    layout: str, path: str, parts: dict[str, StateDict], hints: Hints, unused: list[str] | None = None
) -> Weights:
    """Weights with Meta's names and Meta's interpolation."""
    registers = parts["backbone"].get("register_tokens")
    antialias, offset = published_interpolation(0 if registers is None else registers.shape[1])
    return make_weights(
        layout,
        path,
        parts,
        antialias=antialias,
        offset=offset,
        num_heads=hints.num_heads,
        table_grid=hints.table_grid,
        unused=unused or (),
    )
