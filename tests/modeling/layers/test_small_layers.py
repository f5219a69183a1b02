"""Attention, feed-forward, LayerScale, patches, pixels, and the block they make."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dinoengine.modeling.layers.attention import Attention
from dinoengine.modeling.layers.attention_kernels import Layout
from dinoengine.modeling.layers.block import Block
from dinoengine.modeling.layers.layer_scale import LayerScale
from dinoengine.modeling.layers.mlp import Mlp, SwiGLU
from dinoengine.modeling.layers.patch_embed import PatchEmbed
from dinoengine.modeling.layers.pixel_norm import PixelNorm


def test_attention_equals_the_slow_softmax() -> None:
    attention = Attention(6, 2)
    x = torch.randn(2, 5, 6)
    out = attention(x.flatten(0, 1), Layout(((2, 5),)))
    q, k, v = attention.qkv(x).split(6, dim=-1)
    heads = []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        scores = (q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5).softmax(-1)
        heads.append(scores @ v[..., part])
    expected = attention.proj(torch.cat(heads, -1)).flatten(0, 1)
    torch.testing.assert_close(out, expected)
    some = torch.tensor([7, 0, 3])
    torch.testing.assert_close(attention(x.flatten(0, 1), Layout(((2, 5),)), wanted=some), expected[some])


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="width 6 is not divisible by the number of attention heads 4"):
        Attention(6, 4)


@pytest.mark.parametrize(("dim", "hidden"), [(1024, 2736), (1536, 4096), (64, 176)])
def test_swiglu_has_the_published_hidden_width(dim: int, hidden: int) -> None:
    with torch.device("meta"):
        layer = SwiGLU(dim)
    assert layer.w12.weight.shape == (2 * hidden, dim)
    assert layer.w3.weight.shape == (dim, hidden)


def test_swiglu_gates_its_first_half() -> None:
    layer = SwiGLU(6)
    x = torch.randn(2, 3, 6)
    hidden = layer.w3.in_features
    w, b = layer.w12.weight, layer.w12.bias
    gate, value = F.linear(x, w[:hidden], b[:hidden]), F.linear(x, w[hidden:], b[hidden:])
    torch.testing.assert_close(layer(x), layer.w3(gate * torch.sigmoid(gate) * value))


def test_mlp_and_biases() -> None:
    layer = Mlp(4, ratio=2.0, bias=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), F.gelu(x @ layer.fc1.weight.T) @ layer.fc2.weight.T)
    assert layer.fc1.weight.shape == (8, 4)
    assert layer.fc1.bias is None


def test_layer_scale_promotes_a_16_bit_branch() -> None:
    layer = LayerScale(3, 0.5)
    out = layer(torch.ones(2, 3, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full((2, 3), 0.5))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_patches_are_row_major_products(channels: int) -> None:
    layer = PatchEmbed(2, channels, 5)
    images = torch.randn(1, channels, 4, 6)
    out = layer(images)
    assert out.shape == (1, 6, 5)
    patch = images[0, :, 2:4, 4:6]  # second row, third column: the last of 2 x 3
    expected = (layer.proj.weight * patch).sum((1, 2, 3)) + layer.proj.bias
    torch.testing.assert_close(out[0, 5], expected)


def test_a_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="Image size 4 x 7 is not a multiple of the patch size 2"):
        PatchEmbed(2, 3, 5)(torch.zeros(1, 3, 4, 7))


def test_pixels_are_normalised_per_channel() -> None:
    norm = PixelNorm([0.5, 0.25], [0.5, 0.1])
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    torch.testing.assert_close(norm(images), torch.tensor([-1.0, 7.5]).view(1, 2, 1, 1))
    torch.testing.assert_close(norm(images / 255.0), norm(images))
    assert norm.state_dict() == {}
    with pytest.raises(ValueError, match=r"3 channels, the model takes 2 .*INPUT\.FORMAT"):
        norm(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((3, 8, 8), r"a single image becomes a batch by images\[None\]"), ((8, 8), r"the shape \(8, 8\)\.")],
)
def test_what_is_no_batch_of_images_is_refused(shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected a batch of images \[B, C, H, W\], got .*{hint}"):
        PixelNorm([0.5] * 3, [0.5] * 3)(torch.zeros(shape))


def test_a_block_is_two_scaled_residuals() -> None:
    block = Block(6, 2, layer_scale_init=0.3)
    x = torch.randn(2, 4, 6)
    attended = block.attn(block.norm1(x).flatten(0, 1), Layout(((2, 4),))).view(2, 4, 6)
    middle = x + 0.3 * attended
    (out,) = block([x])
    torch.testing.assert_close(out, middle + 0.3 * block.mlp(block.norm2(middle)))
    assert block.norm1.eps == 1e-6


def test_a_block_without_layer_scale_has_no_gamma() -> None:
    assert not any("gamma" in name for name, _ in Block(6, 2, layer_scale_init=0.0).named_parameters())


def test_stochastic_depth_draws_anew_for_each_branch_and_only_in_training() -> None:
    block = Block(6, 2, layer_scale_init=1.0, drop_path_rate=0.5)
    seen: dict[str, list[int]] = {"attn": [], "mlp": []}
    block.attn.register_forward_hook(lambda m, i, o: seen["attn"].append(len(i[0])))
    block.mlp.register_forward_hook(lambda m, i, o: seen["mlp"].append(len(i[0])))
    x = torch.randn(8, 3, 6)
    block([x])
    block.eval()([x])
    assert seen == {"attn": [4 * 3, 8 * 3], "mlp": [4 * 3, 8 * 3]}
