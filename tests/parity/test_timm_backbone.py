"""The backbone equals that of timm: same weights, same images, same tokens.

timm resamples the position table with ``resample_abs_pos_embed``: to the size, with antialiasing. That is
``interpolate_antialias=True, interpolate_offset=0`` here, for models with and without registers.
"""

from __future__ import annotations

import functools
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from dinoengine.modeling.backbone import VIT_SIZES, VisionTransformer
from dinoengine.structures import BackboneOutput
from tests.parity.comparison import TOLERANCE, largest_difference, load_except_mask_token, random_images, randomise

# timm name -> (size, registers, FFN)
MODELS = {
    "vit_small_patch14_dinov2": ("small", 0, "mlp"),
    "vit_small_patch14_reg4_dinov2": ("small", 4, "mlp"),
    "vit_giant_patch14_dinov2": ("giant", 0, "swiglu"),
}
SIZES = [(70, 70), (98, 98), (42, 42), (70, 98), (112, 56), (14, 84)]


def _from_timm(state: dict[str, Tensor], ffn: str) -> dict[str, Tensor]:
    """timm's tensors under our names. With registers timm's table has no row for CLS, which here adds 0."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("reg_token", "register_tokens")
        if ffn == "swiglu":
            name = name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
        if name == "pos_embed" and "reg_token" in state:
            tensor = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
        renamed[name] = tensor
    return renamed


@functools.cache
def _pair(name: str, native_px: int = 70, depth: int = 2) -> tuple[nn.Module, VisionTransformer]:
    """timm's model with random weights and ours with the same ones; tests must leave both as they are."""
    size, registers, ffn = MODELS[name]
    theirs = timm.create_model(name, depth=depth, img_size=native_px, dynamic_img_size=True).eval()
    randomise(theirs)
    ours = VisionTransformer(
        img_size=(native_px, native_px),
        patch_size=14,
        num_register_tokens=registers,
        ffn=ffn,
        interpolate_antialias=True,
        interpolate_offset=0.0,
        **{**VIT_SIZES[size]._asdict(), "depth": depth},
    ).eval()
    load_except_mask_token(ours, _from_timm(theirs.state_dict(), ffn))
    return theirs, ours


def _compare(theirs: nn.Module, ours: VisionTransformer, images: Tensor) -> float:
    tokens = theirs.forward_features(images)  # type: ignore[operator]
    first_patch = 1 + ours.num_register_tokens
    return largest_difference(ours(images), tokens[:, 0], tokens[:, 1:first_patch], tokens[:, first_patch:])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_are_those_of_timm_at_native_and_other_sizes(name: str) -> None:
    theirs, ours = _pair(name)
    for size in SIZES:
        assert _compare(theirs, ours, random_images(size)) < TOLERANCE, size


@torch.no_grad()
def test_tokens_are_those_of_timm_at_the_published_depth_and_518_pixels() -> None:
    theirs, ours = _pair("vit_small_patch14_dinov2", native_px=518, depth=12)
    assert _compare(theirs, ours, random_images((518, 518), batch=1)) < TOLERANCE
    assert _compare(theirs, ours, random_images((224, 224), batch=1)) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_intermediate_layers_are_those_of_timm(name: str) -> None:
    theirs, ours = _pair(name)
    images = random_images((70, 98))
    blocks = [0, ours.num_layers - 1]
    for norm in (True, False):
        expected = theirs.forward_intermediates(  # type: ignore[operator]
            images, blocks, return_prefix_tokens=True, norm=norm, output_fmt="NLC", intermediates_only=True
        )
        got = ours.get_intermediate_layers(images, blocks, norm=norm)
        assert len(got) == len(expected) == 2
        for output, (patches, prefix) in zip(got, expected, strict=True):
            scale = patches.abs().max().item()  # without the norm the tokens are larger than 1
            assert largest_difference(output, prefix[:, 0], prefix[:, 1:], patches) < TOLERANCE * max(1.0, scale)


@pytest.mark.parametrize(("attribute", "wrong"), [("interpolate_antialias", False), ("interpolate_offset", 0.1)])
@torch.no_grad()
def test_with_another_interpolation_they_differ(
    attribute: str, wrong: bool | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail, and does where it should: at sizes other than the table's."""
    theirs, ours = _pair("vit_small_patch14_dinov2")
    monkeypatch.setattr(ours, attribute, wrong)
    assert _compare(theirs, ours, random_images((70, 70))) < TOLERANCE
    assert _compare(theirs, ours, random_images((42, 42))) > 100 * TOLERANCE


def test_nan_in_the_last_tokens_is_no_agreement() -> None:
    zeros = torch.zeros(1, 4, 8)
    output = BackboneOutput(zeros[:, 0], zeros[:, :2], torch.full_like(zeros, math.nan), (2, 2))
    assert math.isnan(largest_difference(output, zeros[:, 0], zeros[:, :2], zeros))
