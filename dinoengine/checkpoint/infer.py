"""What model the entries of a file are of, by their names and shapes, and which of them do not belong to it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dinoengine.checkpoint.files import CheckpointError, StateDict, grouped_names, short_list
from dinoengine.checkpoint.heads import (
    Shapes,
    dino_head_shapes,
    is_dino_head,
    linear_head_shapes,
    with_older_names,
)
from dinoengine.checkpoint.weights import PUBLISHED_HEAD_WIDTH, BackboneSpec, Weights, entry_name, is_backbone


def make_weights(
    layout: str,
    path: str,
    parts: dict[str, StateDict],
    *,
    antialias: bool,
    offset: float,
    num_heads: int | None = None,
    table_grid: tuple[int, int] | None = None,
    optional: Sequence[str] = (),
    unused: Sequence[str] = (),
    **more: Any,
) -> Weights:
    """Work out what model the backbone is, and account for every entry.

    Args:
        parts: as in ``Weights``; entries that a part has no place for go to ``Weights.unused``.
        num_heads: None: one per 64 channels.
        table_grid: None: the position table is square.
        optional: entries of the backbone that this layout never has (``mask_token``).
        unused: what the layout itself has no place for.
        more: further attributes of ``Weights``.

    Raises:
        CheckpointError: if it is no vision transformer, or an entry has another shape than its name says.
    """
    if not parts.get("backbone"):
        raise CheckpointError(
            f"{path} has no entry of a backbone of the {layout} layout; it has {short_list(grouped_names(list(unused)))}."
        )
    spec = infer_spec(parts["backbone"], path, num_heads, table_grid, antialias, offset)
    backbone_shapes: Shapes = {name: tuple(value.shape) for name, value in spec.build("meta").state_dict().items()}
    weights = Weights(layout, spec, {}, unused=list(unused), **more)
    misshapen: list[str] = []
    for part, entries in parts.items():
        if is_backbone(part):
            expected = backbone_shapes
        elif is_dino_head(part):
            entries = with_older_names(entries)
            expected = dino_head_shapes(entries, spec.embed_dim, path, part)
        elif part == "linear_head":
            expected = linear_head_shapes(entries)
        else:  # centres, of as many prototypes as there are
            expected = {name: tuple(value.shape) for name, value in entries.items()}
        may_lack = optional if is_backbone(part) else ()
        weights.missing += [entry_name(part, n) for n in expected if n not in entries and n not in may_lack]
        weights.unused += [entry_name(part, n) for n in entries if n not in expected]
        misshapen += [
            f"{entry_name(part, name)} {list(entries[name].shape)} (expected {list(shape)})"
            for name, shape in expected.items()
            if name in entries and tuple(entries[name].shape) != shape
        ]
        weights.parts[part] = {name: value for name, value in entries.items() if name in expected}
    if misshapen:
        raise CheckpointError(
            f"{path} (layout {layout}) looks like {spec.describe()}, but {len(misshapen)} entries have another shape: "
            f"{short_list(misshapen)}."
        )
    weights.absent = [name for name in optional if name in backbone_shapes and name not in weights.backbone]
    return weights


def infer_spec(
    backbone: StateDict,
    path: str,
    num_heads: int | None,
    table_grid: tuple[int, int] | None,
    antialias: bool,
    offset: float,
) -> BackboneSpec:
    """Read the shape of the model off the shapes of its entries; see ``make_weights``."""
    blocks = {int(match[1]) for name in backbone if (match := re.match(r"blocks\.(\d+)\.", name))}
    patches, table = _entry(backbone, "patch_embed.proj.weight", 4), _entry(backbone, "pos_embed", 3)
    if patches is None or table is None or not blocks or not patches.numel():
        raise CheckpointError(
            f"{path} holds no vision transformer that is known here (no patch embedding, position table and blocks); it "
            f"has {short_list(grouped_names(list(backbone))) or 'nothing'}."
        )
    embed_dim, in_chans, patch_size, _ = patches.shape
    is_swiglu = "blocks.0.mlp.w12.weight" in backbone
    hidden = _entry(backbone, "blocks.0.mlp.w3.weight" if is_swiglu else "blocks.0.mlp.fc2.weight", 2)
    registers = _entry(backbone, "register_tokens", 3)
    return BackboneSpec(
        embed_dim=embed_dim,
        depth=max(blocks) + 1,
        num_heads=_num_heads(num_heads, embed_dim, path),
        patch_size=patch_size,
        in_chans=in_chans,
        table_grid=_table_grid(table_grid, table.shape[1] - 1, path),
        num_register_tokens=0 if registers is None else registers.shape[1],
        ffn="swiglu" if is_swiglu else "mlp",
        ffn_hidden=4 * embed_dim if hidden is None else hidden.shape[1],
        layer_scale="blocks.0.ls1.gamma" in backbone,
        qkv_bias="blocks.0.attn.qkv.bias" in backbone,
        proj_bias="blocks.0.attn.proj.bias" in backbone,
        ffn_bias=f"blocks.0.mlp.{'w3' if is_swiglu else 'fc2'}.bias" in backbone,
        interpolate_antialias=antialias,
        interpolate_offset=offset,
    )


def _entry(entries: StateDict, name: str, ndim: int) -> Tensor | None:
    """None also for an entry of another number of dimensions, which says nothing of the model."""
    value = entries.get(name)
    return value if value is not None and value.ndim == ndim else None


def _num_heads(given: object, embed_dim: int, path: str) -> int:
    if given is None:
        if embed_dim % PUBLISHED_HEAD_WIDTH:
            raise CheckpointError(
                f"{path} does not state its number of attention heads, and {embed_dim} channels are not a multiple of "
                f"{PUBLISHED_HEAD_WIDTH}; give it (--num-heads N, in Python Hints(num_heads=N))."
            )
        return embed_dim // PUBLISHED_HEAD_WIDTH
    if type(given) is not int or given < 1 or embed_dim % given:
        raise CheckpointError(
            f"{path}: the number of attention heads must be a whole number that divides the {embed_dim} channels; got "
            f"{given!r}."
        )
    return given


def _table_grid(given: tuple[int, int] | None, num_positions: int, path: str) -> tuple[int, int]:
    if given is None:
        return _square(num_positions, path)
    rows, columns = given
    if type(rows) is not int or type(columns) is not int or rows < 1 or rows * columns != num_positions:
        raise CheckpointError(
            f"{path} has {num_positions} positions of patches; they make no grid of {rows!r} rows and {columns!r} columns."
        )
    return rows, columns


def _square(num_positions: int, path: str) -> tuple[int, int]:
    edge = math.isqrt(max(0, num_positions))
    if edge < 1 or edge * edge != num_positions:
        raise CheckpointError(
            f"The position table of {path} has {num_positions} patches, which is no square; give its rows and columns "
            "(--grid ROWS COLUMNS, in Python Hints(table_grid=(rows, columns)))."
        )
    return edge, edge
