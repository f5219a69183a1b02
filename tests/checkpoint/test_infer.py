"""What the names and shapes of a file say of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.modeling.backbone.vit import VIT_SIZES
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS, WITHOUT_SCALE, random_weights

# Entries and parameters of the published files, in the order S, B, L, g.
PUBLISHED = {
    ("small", 0): (175, 22_056_576),
    ("small", 4): (176, 22_058_112),
    ("base", 0): (175, 86_580_480),
    ("base", 4): (176, 86_583_552),
    ("large", 0): (343, 304_368_640),
    ("large", 4): (344, 304_372_736),
    ("giant", 0): (567, 1_136_480_768),
    ("giant", 4): (568, 1_136_486_912),
}


def _read(entries: dict[str, torch.Tensor], spec: BackboneSpec) -> BackboneSpec:
    flags = {"antialias": spec.interpolate_antialias, "offset": spec.interpolate_offset}
    return make_weights("meta", "x.pth", {"backbone": entries}, table_grid=spec.table_grid, **flags).spec  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        WITH_REGISTERS,
        SWIGLU,
        WITHOUT_SCALE,
        replace(SMALL, in_chans=1, patch_size=4, table_grid=(2, 5)),
        replace(SMALL, qkv_bias=False),
        replace(SMALL, ffn_bias=False, proj_bias=False),
        replace(SMALL, ffn_hidden=200),
        replace(SMALL, ffn_hidden=131),
        replace(SWIGLU, ffn_hidden=104),
    ],
)
def test_a_model_is_recognised_by_its_entries(spec: BackboneSpec) -> None:
    assert _read(random_weights(spec).backbone, spec) == spec


@pytest.mark.parametrize(("size", "registers"), PUBLISHED)
def test_published_files_are_recognised(size: str, registers: int) -> None:
    dim, depth, heads = VIT_SIZES[size]
    ffn = {"ffn": "swiglu", "ffn_hidden": 4096} if size == "giant" else {"ffn": "mlp", "ffn_hidden": 4 * dim}
    spec = replace(
        SMALL,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        patch_size=14,
        table_grid=(37, 37),
        num_register_tokens=registers,
        **ffn,
    )
    entries = spec.build("meta").state_dict()
    assert (len(entries), sum(v.numel() for v in entries.values())) == PUBLISHED[size, registers]
    read = _read(entries, spec)
    assert read == spec
    letter = {"small": "S", "base": "B", "large": "L", "giant": "g"}[size]
    assert read.describe().startswith(
        f"ViT-{letter}/14{', 4 registers' if registers else ''}, {spec.ffn}, positions 37 x 37"
    )


def test_an_entry_of_another_shape_is_an_error_with_both_shapes() -> None:
    entries = random_weights().backbone
    entries["blocks.2.attn.proj.weight"] = torch.zeros(64, 63)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn\.proj\.weight \[64, 63\] \(expected \[64, 64\]\)"):
        _read(entries, SMALL)


def test_a_width_that_does_not_tell_its_heads() -> None:
    entries = random_weights(replace(SMALL, embed_dim=96, num_heads=3, ffn_hidden=384)).backbone
    with pytest.raises(CheckpointError, match="96 channels are not a multiple of 64; give it"):
        _read(entries, SMALL)


@pytest.mark.parametrize("num_heads", [0, -1, 3, "4", 2.0, True])
def test_heads_that_cannot_be_are_refused(num_heads: Any) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: .*attention heads.*divides.* 64 channels; got"):
        make_weights("meta", "x.pth", random_weights().parts, antialias=False, offset=0.1, num_heads=num_heads)


@pytest.mark.parametrize("grid", [(0, 16), (-4, -4), (4.0, 4.0), (3, 5)])
def test_a_grid_that_cannot_be_is_refused(grid: Any) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth has 16 positions.*grid of .* rows and .* columns"):
        make_weights("meta", "x.pth", random_weights().parts, antialias=False, offset=0.1, table_grid=grid)


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc2.weight", "cls_token"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 2), (1, 2, 3), (64, 3, 7, 0)])
def test_no_shape_ends_in_a_traceback(name: str, shape: tuple[int, ...]) -> None:
    entries = random_weights(WITH_REGISTERS).backbone | {name: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        make_weights("meta", "x.pth", {"backbone": entries}, antialias=False, offset=0.1)


def test_registers_that_are_none_have_no_place() -> None:
    entries = random_weights().backbone | {"register_tokens": torch.zeros(4)}
    assert make_weights("meta", "x.pth", {"backbone": entries}, antialias=False, offset=0.1).unused == [
        "register_tokens"
    ]
