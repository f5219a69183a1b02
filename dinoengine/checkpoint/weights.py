"""A vision transformer's weights under dinoengine's names, whatever file they came from.

``layouts/`` reads every foreign file into ``Weights`` and writes ``Weights`` back; resizing, export, inspection and
``MODEL.WEIGHTS`` work on nothing else.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.files import CheckpointError, StateDict, grouped_names, short_list
from dinoengine.checkpoint.heads import (
    Shapes,
    dino_head_shapes,
    is_dino_head,
    linear_head_shapes,
    with_older_names,
)
from dinoengine.modeling.backbone.vit import VIT_SIZES, VisionTransformer

# Published transformers have 64 channels per attention head; their files do not state the number of heads.
PUBLISHED_HEAD_WIDTH = 64

# How the entries of our models begin -> (the part of ``Weights`` they belong to, how their names begin there).
SELF_DISTILLATION_PARTS = {
    "teacher.backbone.": ("backbone", ""),
    "teacher.dino_head.": ("dino_head", ""),
    "teacher.ibot_head.": ("ibot_head", ""),
    "student.backbone.": ("student.backbone", ""),
    "student.dino_head.": ("student.dino_head", ""),
    "student.ibot_head.": ("student.ibot_head", ""),
    "dino_targets.center": ("centers", "dino"),
    "ibot_targets.center": ("centers", "ibot"),
}
CLASSIFIER_PARTS = {
    "backbone.": ("backbone", ""),
    "head.": ("linear_head", ""),
}


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone's weights, and the layout they came in, say of the model.

    Attributes:
        table_grid: (rows, columns) of the position table.
        ffn_hidden: width inside the feed-forward layer (for SwiGLU of each of its two halves).
        interpolate_antialias, interpolate_offset: how positions are interpolated at other sizes. No file states it; it is
            a property of the layout.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    in_chans: int
    table_grid: tuple[int, int]
    num_register_tokens: int
    ffn: str
    ffn_hidden: int
    layer_scale: bool
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    interpolate_antialias: bool
    interpolate_offset: float

    @property
    def img_size(self) -> tuple[int, int]:
        """(rows, columns) in pixels at which positions are not interpolated."""
        return (self.table_grid[0] * self.patch_size, self.table_grid[1] * self.patch_size)

    @property
    def size_name(self) -> str:
        """The row of the size table, or "" if there is none."""
        shape = (self.embed_dim, self.depth, self.num_heads)
        return next((name for name, size in VIT_SIZES.items() if tuple(size) == shape), "")

    def build(self, device: torch.device | str = "cpu") -> VisionTransformer:
        """The model, with initial weights, in eval mode."""
        values = asdict(self)
        grid, hidden, layer_scale = values.pop("table_grid"), values.pop("ffn_hidden"), values.pop("layer_scale")
        del grid
        with torch.device(device):
            model = VisionTransformer(
                img_size=self.img_size,
                ffn_ratio=ffn_ratio(self.ffn, self.embed_dim, hidden),
                layer_scale_init=1.0 if layer_scale else 0.0,
                **values,
            )
        return model.eval()

    def describe(self) -> str:
        """One line for people: ``ViT-S/14, 4 registers, mlp, positions 37 x 37 (518 x 518 pixels)``."""
        letters = {"small": "ViT-S", "base": "ViT-B", "large": "ViT-L", "giant": "ViT-g"}
        name = letters.get(self.size_name, f"ViT-{self.size_name}" if self.size_name else "ViT")
        shape = "" if self.size_name else f" ({self.embed_dim} wide, {self.depth} deep, {self.num_heads} heads)"
        registers = f", {self.num_register_tokens} registers" if self.num_register_tokens else ""
        channels = f", {self.in_chans} channels" if self.in_chans != 3 else ""
        scale = "" if self.layer_scale else ", no LayerScale"
        rows, columns = self.table_grid
        return (
            f"{name}/{self.patch_size}{shape}{registers}{channels}, {self.ffn}{scale}, "
            f"positions {rows} x {columns} ({self.img_size[0]} x {self.img_size[1]} pixels)"
        )

    def config_options(self) -> dict[str, Any]:
        """The MODEL.VIT keys that build this backbone."""
        options: dict[str, Any] = {"SIZE": self.size_name} if self.size_name else {}
        if not self.size_name:
            options |= {"EMBED_DIM": self.embed_dim, "DEPTH": self.depth, "NUM_HEADS": self.num_heads}
        options |= {
            # Any value that is not 0 will do: the weights bring their own.
            "LAYER_SCALE_INIT": 1e-5 if self.layer_scale else 0.0,
            "PATCH_SIZE_PX": self.patch_size,
            "POS_EMBED_SIZE_PX": self.img_size,
            "NUM_REGISTER_TOKENS": self.num_register_tokens,
            "FFN": self.ffn,
            "FFN_RATIO": ffn_ratio(self.ffn, self.embed_dim, self.ffn_hidden),
            "QKV_BIAS": self.qkv_bias,
            "PROJ_BIAS": self.proj_bias,
            "FFN_BIAS": self.ffn_bias,
            "INTERPOLATE_ANTIALIAS": self.interpolate_antialias,
            "INTERPOLATE_OFFSET": self.interpolate_offset,
        }
        return {f"MODEL.VIT.{key}": value for key, value in options.items()}


@dataclass
class Weights:
    """Entries by part, with dinoengine's names inside each part.

    Attributes:
        layout: name of the layout they were read from.
        parts: "backbone" (the teacher's, or the only one); where the file has them "dino_head" and "ibot_head" of the
            teacher, the same three as "student.backbone" ..., "linear_head" ("weight", "bias"), and "centers" ("dino",
            "ibot", each [1, K]).
        missing: entries of the parts that the file should have and has not; ``dino_head.x``, but ``x`` of the backbone.
        absent: entries of the backbone that its layout never stores (the mask token, in some).
        unused: entries of the file that nothing here has a place for, under the file's names.
        left_out: what else lies in the file and belongs to the training that wrote it (optimizer, counters).
        states_shape: whether the file says the number of attention heads and the grid of the position table.
        iteration: last finished iteration of the run, where the file states it.
        config: text of the dinoengine config the run had, where the file has it.
    """

    layout: str
    spec: BackboneSpec
    parts: dict[str, StateDict]
    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    states_shape: bool = False
    iteration: int | None = None
    config: str | None = None

    @property
    def backbone(self) -> StateDict:
        return self.parts["backbone"]

    def require_complete(self, path: str, allow: Sequence[str] = ()) -> None:
        """
        Args:
            allow: patterns (``fnmatch``) of entries that may be missing, unused or not finite.

        Raises:
            CheckpointError: names every other one.
        """
        self.account_for(
            path,
            {
                "missing": not_allowed(self.missing, allow),
                "without a place": not_allowed(self.unused, allow),
                "with values that are not finite": not_allowed(self.not_finite(), allow),
            },
            "If that is right, allow these entries by name (--allow PATTERN of the conversion tools).",
        )

    def not_finite(self) -> list[str]:
        """Entries with NaN or infinity in them."""
        return [
            entry_name(part, name)
            for part, entries in self.parts.items()
            for name, value in entries.items()
            if not value.isfinite().all()
        ]

    def account_for(self, path: str, named: dict[str, list[str]], advice: str) -> None:
        """CheckpointError with ``advice`` if any of the lists in ``named`` (what is wrong -> entries) has something."""
        problems = [f"{len(n)} {what}: {short_list(grouped_names(n))}" for what, n in named.items() if n]
        if problems:
            raise CheckpointError(
                f"{path} (layout {self.layout}, {self.spec.describe()}) does not add up:\n  "
                + "\n  ".join(problems)
                + f"\n{advice}"
            )

    def load_backbone(self) -> VisionTransformer:
        """The (teacher's) backbone with these weights, in eval mode. Entries that are missing keep initial values."""
        model = self.spec.build()
        model.load_state_dict(self.backbone, strict=False)
        return model


def entry_name(part: str, name: str) -> str:
    """How messages call an entry: that of the (teacher's) backbone by its name alone, of the student's ``student.x``."""
    return f"{part.removesuffix('backbone')}{name}" if is_backbone(part) else f"{part}.{name}"


def is_backbone(part: str) -> bool:
    """Whether a part of ``Weights`` is a backbone, the teacher's or the student's."""
    return part.rpartition(".")[2] == "backbone"


def not_allowed(names: Sequence[str], allow: Sequence[str]) -> list[str]:
    """The names that match none of the patterns."""
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)]


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
                f"{PUBLISHED_HEAD_WIDTH}; give it (--num-heads)."
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
            "(--grid ROWS COLUMNS)."
        )
    return edge, edge


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of ``size`` pixels.

    Raises:
        ValueError: if the size is no multiple of the patch; gives the nearest below that is.
    """
    if min(size) < patch_size or size[0] % patch_size or size[1] % patch_size:
        whole = [max(1, edge // patch_size) * patch_size for edge in size]
        raise ValueError(
            f"The image size {size[0]} x {size[1]} is no multiple of the patch size {patch_size}; give one that is "
            f"(--img-size {whole[0]} {whole[1]})."
        )
    return size[0] // patch_size, size[1] // patch_size


def ffn_ratio(ffn: str, embed_dim: int, hidden: int) -> float:
    """The MODEL.VIT.FFN_RATIO that gives ``hidden`` channels, 4.0 where that does."""
    default = 4.0
    inner = int(embed_dim * default)
    if hidden == (inner if ffn == "mlp" else (int(inner * 2 / 3) + 7) // 8 * 8):
        return default
    wanted = hidden if ffn == "mlp" else hidden * 3 // 2
    ratio = wanted / embed_dim
    while int(embed_dim * ratio) < wanted:  # the quotient may round down
        ratio = math.nextafter(ratio, math.inf)
    return ratio
