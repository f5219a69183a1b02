"""The backbone equals Dinov2Model and Dinov2WithRegistersModel of Hugging Face transformers.

Both resample the position table to the size; ``Dinov2`` without antialiasing (``interpolate_antialias=False,
interpolate_offset=0`` here), ``Dinov2WithRegisters`` with (``True, 0``). The published models without registers were
trained with an offset of 0.1, which transformers does not have; tests/modeling/layers/test_position.py covers that one.

Weights are taken from the files that ``save_pretrained`` writes: their names are the format, those of the modules
changed from version to version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from dinoengine.modeling.backbone import VisionTransformer
from tests.parity.comparison import TOLERANCE, largest_difference, load_except_mask_token, random_images, randomise

NATIVE = (70, 70)
SIZES = [NATIVE, (98, 98), (42, 42), (70, 98), (112, 56), (14, 84)]
SHAPE = {"embed_dim": 48, "depth": 3, "num_heads": 4}
KINDS = ["mlp", "swiglu", "registers", "registers, swiglu"]

# Hugging Face -> ours, outside the blocks and inside one; attention is apart.
EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model.safetensors under our names; query, key and value become one matrix, in this order."""
    renamed = {}
    for name, tensor in state.items():
        if name in EMBEDDINGS:
            renamed[EMBEDDINGS[name]] = tensor
            continue
        _, _, block, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        if module == "attention.attention.query":
            parts = [state[name.replace("query", which)] for which in ("query", "key", "value")]
            renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
        elif rest in BLOCK:
            renamed[f"blocks.{block}.{BLOCK[rest]}"] = tensor
        elif module not in ("attention.attention.key", "attention.attention.value"):
            renamed[f"blocks.{block}.{BLOCK[module]}.{kind}"] = tensor
    return renamed


def _pair(kind: str, folder: Path, **options: Any) -> tuple[nn.Module, VisionTransformer]:
    """Their model with random weights and ours with the same ones."""
    registers, swiglu = 4 * ("registers" in kind), "swiglu" in kind
    sizes = {
        "hidden_size": SHAPE["embed_dim"],
        "num_hidden_layers": SHAPE["depth"],
        "num_attention_heads": SHAPE["num_heads"],
        "image_size": NATIVE[0],
        "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    ours = VisionTransformer(
        img_size=NATIVE,
        patch_size=14,
        num_register_tokens=registers,
        ffn="swiglu" if swiglu else "mlp",
        **{**SHAPE, "interpolate_antialias": bool(registers), "interpolate_offset": 0.0, **options},
    ).eval()
    load_except_mask_token(ours, _from_transformers(load_file(folder / "model.safetensors")))
    return theirs, ours


def _compare(theirs: nn.Module, ours: VisionTransformer, images: Tensor, masks: Tensor | None = None) -> float:
    tokens = theirs(images, bool_masked_pos=masks).last_hidden_state
    first_patch = 1 + ours.num_register_tokens
    return largest_difference(ours(images, masks), tokens[:, 0], tokens[:, 1:first_patch], tokens[:, first_patch:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_those_of_transformers_at_native_and_other_sizes(kind: str, tmp_path: Path) -> None:
    theirs, ours = _pair(kind, tmp_path)
    for size in SIZES:
        assert _compare(theirs, ours, random_images(size)) < TOLERANCE, size


@pytest.mark.parametrize("kind", ["mlp", "registers"])
@torch.no_grad()
def test_masked_patches_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs, ours = _pair(kind, tmp_path)
    masks = torch.rand(2, 35, generator=torch.Generator().manual_seed(2)) < 0.5
    assert _compare(theirs, ours, random_images((70, 98)), masks) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_intermediate_layers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs, ours = _pair(kind, tmp_path)
    images = random_images((70, 98))
    blocks = theirs(images, output_hidden_states=True).hidden_states[1:]  # the first are the embeddings
    first_patch = 1 + ours.num_register_tokens
    for norm in (True, False):
        got = ours.get_intermediate_layers(images, range(3), norm=norm)
        for output, stream in zip(got, blocks, strict=True):
            tokens = theirs.layernorm(stream) if norm else stream  # type: ignore[operator]
            parts = tokens[:, 0], tokens[:, 1:first_patch], tokens[:, first_patch:]
            assert largest_difference(output, *parts) < TOLERANCE * max(1.0, tokens.abs().max().item())


@pytest.mark.parametrize(("kind", "wrong"), [("mlp", True), ("registers", False)])
@torch.no_grad()
def test_with_the_antialiasing_of_the_other_they_differ(kind: str, wrong: bool, tmp_path: Path) -> None:
    theirs, ours = _pair(kind, tmp_path, interpolate_antialias=wrong)
    assert _compare(theirs, ours, random_images(NATIVE)) < TOLERANCE
    assert _compare(theirs, ours, random_images((42, 42))) > 100 * TOLERANCE
