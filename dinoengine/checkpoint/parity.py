"""Whether two weight files compute the same: both models run on the same random images."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.files import CheckpointError, StateDict
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.layouts.layout import Hints
from dinoengine.checkpoint.reading import read_content
from dinoengine.checkpoint.weights import BackboneSpec, Weights, entry_name, ffn_ratio, is_backbone

# Largest difference over the largest value (but at least 1) in fp32: kernels order their sums differently.
RELATIVE_TOLERANCE = 1e-4

TokensOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One line of a parity check.

    Attributes:
        difference: largest absolute difference of all tokens.
        scale: largest absolute value.
        must_agree: False where another result is right, which ``if_not`` explains.
    """

    what: str
    difference: float
    scale: float
    must_agree: bool = True
    if_not: str = "differs, as the layouts interpolate otherwise"

    @property
    def agrees(self) -> bool:
        is_finite = math.isfinite(self.difference) and math.isfinite(self.scale)
        return is_finite and self.difference <= RELATIVE_TOLERANCE * max(1.0, self.scale)

    def line(self) -> str:
        verdict = "ok" if self.agrees else "FAILED" if self.must_agree else self.if_not
        return f"{self.what}: max abs difference {self.difference:.3g} (values up to {self.scale:.3g}): {verdict}"


def compare_files(weights: Weights, path: str, layout: str, hints: Hints) -> list[Comparison]:
    """Every part of ``weights`` against the file at ``path``.

    Backbones run at their own size and at a smaller one that is not square; the teacher's in the library the file is
    made for, where that is installed, else as it is read back. The other parts, and mask tokens, are compared by value.

    Raises:
        CheckpointError: if the file has other parts.
    """
    target = read_weights(path, layout, hints)
    if lacking := [part for part in weights.parts if part not in target.parts]:
        raise CheckpointError(f"The file that was written (layout {layout}) lacks {', '.join(lacking)}.")
    results = []
    for part in filter(is_backbone, weights.parts):
        results += _compare_backbones(_alone(weights, part), _alone(target, part), path, layout, part)
    for part, entries in weights.parts.items():
        names = [name for name in entries if not is_backbone(part) or name == "mask_token"]
        shared = [name for name in names if name in target.parts[part] or not is_backbone(part)]
        if shared:
            what = entry_name(part, "mask_token") if is_backbone(part) else part
            results.append(compare_tensors(what, _values(entries, shared), _values(target.parts[part], shared)))
    return results


def _alone(weights: Weights, part: str) -> Weights:
    return replace(weights, parts={"backbone": weights.parts[part]})


def _values(entries: StateDict, names: list[str]) -> Tensor:
    """All values in a row, [sum of the sizes] of float32; fewer where an entry is missing."""
    return torch.cat([entries[name].flatten().float() for name in names if name in entries])


def _compare_backbones(weights: Weights, target: Weights, path: str, layout: str, part: str) -> list[Comparison]:
    library, tokens_of = f"the file read back ({layout})", tokens_of_backbone(target)
    if part == "backbone":
        library, tokens_of = _foreign_model(path, layout, target) or (library, tokens_of)
    ours = tokens_of_backbone(weights)
    same_rule = (weights.spec.interpolate_antialias, weights.spec.interpolate_offset) == (
        target.spec.interpolate_antialias,
        target.spec.interpolate_offset,
    )
    who = "" if part == "backbone" else f"{part}, "
    rows, columns = weights.spec.table_grid
    results = []
    for grid in ((rows, columns), (max(1, rows * 3 // 4), max(1, columns * 3 // 4) + 1)):
        size = (grid[0] * weights.spec.patch_size, grid[1] * weights.spec.patch_size)
        images = torch.randn(2, weights.spec.in_chans, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, got = ours(images), tokens_of(images)
        is_native = grid == weights.spec.table_grid
        results.append(
            compare_tensors(f"{who}{library} at {size[0]} x {size[1]} pixels", expected, got, is_native or same_rule)
        )
    return results


def compare_tensors(
    what: str, expected: Tensor, got: Tensor, must_agree: bool = True, if_not: str = Comparison.if_not
) -> Comparison:
    """The largest difference of two tensors; NaN, which never agrees, if their shapes differ."""
    difference = (expected - got).abs().max().item() if expected.shape == got.shape else float("nan")
    return Comparison(what, difference, expected.abs().max().item(), must_agree, if_not)


def tokens_of_backbone(weights: Weights) -> TokensOf:
    """images -> all tokens [B, 1 + R + N, D] of the (teacher's) backbone: CLS, registers, patches."""
    model = weights.load_backbone()

    def run(images: Tensor) -> Tensor:
        output = model(images)
        return torch.cat((output.cls_token.unsqueeze(1), output.register_tokens, output.patch_tokens), dim=1)

    return run


def _foreign_model(path: str, layout: str, target: Weights) -> tuple[str, TokensOf] | None:
    """(what runs it, images -> all tokens after the final norm); None if there is no such library here."""
    if layout == "huggingface" and importlib.util.find_spec("transformers"):
        from transformers import AutoModel

        model = AutoModel.from_pretrained(path, local_files_only=True).float().eval()  # it keeps half precision
        return f"transformers {type(model).__name__}", lambda images: model(images).last_hidden_state
    if layout == "timm" and importlib.util.find_spec("timm"):
        timm_model = build_timm_model(target.spec)
        timm_model.load_state_dict(read_content(path).data)
        return "timm VisionTransformer", timm_model.forward_features  # type: ignore[return-value]
    return None


def build_timm_model(spec: BackboneSpec) -> torch.nn.Module:
    """timm's model of this shape, with random weights, in eval mode."""
    from functools import partial

    import timm
    from timm.layers import SwiGLUPacked

    is_swiglu = spec.ffn == "swiglu"
    ratio = 2 * spec.ffn_hidden / spec.embed_dim if is_swiglu else ffn_ratio("mlp", spec.embed_dim, spec.ffn_hidden)
    options: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if is_swiglu else {}
    model: torch.nn.Module = timm.models.vision_transformer.VisionTransformer(
        img_size=spec.img_size,
        patch_size=spec.patch_size,
        in_chans=spec.in_chans,
        num_classes=0,
        global_pool="token",
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=ratio,
        qkv_bias=spec.qkv_bias,
        init_values=1.0 if spec.layer_scale else None,
        reg_tokens=spec.num_register_tokens,
        no_embed_class=spec.num_register_tokens > 0,
        dynamic_img_size=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        **options,
    )
    return model.eval()
