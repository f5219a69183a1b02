"""A vision transformer's weights under dinoengine's names, whatever file they came from.

``layouts/`` reads every foreign file into ``Weights`` and writes ``Weights`` back; resizing, export, inspection and
``MODEL.WEIGHTS`` work on nothing else.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dinoengine.checkpoint.files import CheckpointError, StateDict, grouped_names, short_list
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
            "If that is right, allow these entries by name (--allow PATTERN of the tools, allow= in Python).",
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
