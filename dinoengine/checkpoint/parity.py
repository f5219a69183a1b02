"""Whether two weight files compute the same: both models run on the same random images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.files import StateDict, read_content
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.layouts.layout import Hints
from dinoengine.checkpoint.weights import BackboneSpec, Weights, ffn_ratio
from dinoengine.modeling.heads.dino_head import DINOHead

# Largest difference over the largest value (but at least 1) in fp32: kernels order their sums differently.
TOLERANCE = 1e-4

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
        return self.difference <= TOLERANCE * max(1.0, self.scale)  # False for NaN

    def line(self) -> str:
        verdict = "ok" if self.agrees else "FAILED" if self.must_agree else self.if_not
        return f"{self.what}: max abs difference {self.difference:.3g} (values up to {self.scale:.3g}): {verdict}"


def compare_files(weights: Weights, path: str, layout: str, hints: Hints) -> list[Comparison]:
    """The backbone of ``weights`` against the file at ``path``, at its own size and at a smaller one that is not square.

    The file is run by the library it is made for, where that is installed, else read back into our model; heads always
    by ours.
    """
    target = read_weights(path, layout, hints)
    library, tokens_of = _foreign_model(path, layout, target)
    ours = tokens_of_backbone(weights)
    same_rule = (weights.spec.interpolate_antialias, weights.spec.interpolate_offset) == (
        target.spec.interpolate_antialias,
        target.spec.interpolate_offset,
    )
    rows, columns = weights.spec.table_grid
    results = []
    for grid in ((rows, columns), (max(1, rows * 3 // 4), max(1, columns * 3 // 4) + 1)):
        size = (grid[0] * weights.spec.patch_size, grid[1] * weights.spec.patch_size)
        images = torch.randn(2, weights.spec.in_chans, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, got = ours(images), tokens_of(images)
        is_native = grid == weights.spec.table_grid
        results.append(
            compare_tensors(f"{library} at {size[0]} x {size[1]} pixels", expected, got, is_native or same_rule)
        )
    return results + _compare_heads(weights, target)


def compare_tensors(
    what: str, expected: Tensor, got: Tensor, must_agree: bool = True, if_not: str = Comparison.if_not
) -> Comparison:
    """The largest difference of two tensors; NaN, which never agrees, if their shapes differ."""
    difference = (expected - got).abs().max().item() if expected.shape == got.shape else float("nan")
    return Comparison(what, difference, expected.abs().max().item(), must_agree, if_not)


def _compare_heads(weights: Weights, target: Weights) -> list[Comparison]:
    results = []
    for name in ("dino_head", "ibot_head"):
        if name in weights.parts and name in target.parts:
            head, other = _head(weights, name), _head(target, name)
            features = torch.randn(8, weights.spec.embed_dim, generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                results.append(compare_tensors(name, head(features), other(features)))
    return results


def _head(weights: Weights, name: str) -> DINOHead:
    entries = weights.parts[name]
    head = DINOHead(in_dim=weights.spec.embed_dim, **head_arguments(entries))
    head.load_state_dict(entries)
    return head


def head_arguments(entries: StateDict) -> dict[str, int]:
    """What DINOHead was built with, but for the width of its input, read off the shapes of its entries."""
    layers = sorted({int(key.split(".")[1]) for key in entries if key.startswith("mlp.")})
    num_prototypes, bottleneck_dim = entries["last_layer.weight_v"].shape
    return {
        "num_prototypes": num_prototypes,
        "hidden_dim": entries[f"mlp.{layers[0]}.weight"].shape[0],
        "bottleneck_dim": bottleneck_dim,
        "num_layers": len(layers),
    }


def tokens_of_backbone(weights: Weights) -> TokensOf:
    """images -> all tokens [B, 1 + R + N, D] of the (teacher's) backbone: CLS, registers, patches."""
    model = weights.load_backbone()

    def run(images: Tensor) -> Tensor:
        output = model(images)
        return torch.cat((output.cls_token.unsqueeze(1), output.register_tokens, output.patch_tokens), dim=1)

    return run


def _foreign_model(path: str, layout: str, target: Weights) -> tuple[str, TokensOf]:
    """(what runs it, images -> all tokens after the final norm)."""
    if layout == "huggingface" and importlib.util.find_spec("transformers"):
        from transformers import AutoModel

        model = AutoModel.from_pretrained(path, local_files_only=True).eval()
        return f"transformers {type(model).__name__}", lambda images: model(images).last_hidden_state
    if layout == "timm" and importlib.util.find_spec("timm"):
        timm_model = build_timm_model(target.spec)
        timm_model.load_state_dict(read_content(path).data)
        return "timm VisionTransformer", timm_model.forward_features  # type: ignore[return-value]
    return f"the file read back ({layout})", tokens_of_backbone(target)


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
