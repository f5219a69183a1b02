"""The vision transformer: layout, sizes, tokens, facts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from dinoengine.modeling.backbone import VIT_SIZES, Backbone, Execution, VisionTransformer, build_backbone
from dinoengine.modeling.layers.attention_kernels import KERNELS
from tests.modeling.layers.dense import dense


def _vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "img_size": (8, 8),
        "patch_size": 4,
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 2,
        "layer_scale_init": 0.5,
    }
    return VisionTransformer(**{**settings, **options})


@pytest.mark.parametrize(
    ("size", "ffn", "registers", "parameters", "tensors"),
    [
        ("small", "mlp", 0, 22_056_576, 175),
        ("small", "mlp", 4, 22_058_112, 176),
        ("base", "mlp", 0, 86_580_480, 175),
        ("base", "mlp", 4, 86_583_552, 176),
        ("large", "mlp", 0, 304_368_640, 343),
        ("large", "mlp", 4, 304_372_736, 344),
        ("giant", "swiglu", 0, 1_136_480_768, 567),
        ("giant", "swiglu", 4, 1_136_486_912, 568),
    ],
)
def test_sizes_are_the_published_ones(size: str, ffn: str, registers: int, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=(518, 518), patch_size=14, ffn=ffn, num_register_tokens=registers, **VIT_SIZES[size]._asdict()
        )
    state = vit.state_dict()
    assert sum(v.numel() for v in state.values()) == parameters
    assert len(state) == tensors


def test_names_and_shapes_are_those_of_the_published_files() -> None:
    state = {name: tuple(v.shape) for name, v in _vit(depth=1, num_register_tokens=3).state_dict().items()}
    assert state == {
        "cls_token": (1, 1, 12),
        "pos_embed": (1, 5, 12),
        "mask_token": (1, 12),
        "register_tokens": (1, 3, 12),
        "patch_embed.proj.weight": (12, 3, 4, 4),
        "patch_embed.proj.bias": (12,),
        "blocks.0.norm1.weight": (12,),
        "blocks.0.norm1.bias": (12,),
        "blocks.0.attn.qkv.weight": (36, 12),
        "blocks.0.attn.qkv.bias": (36,),
        "blocks.0.attn.proj.weight": (12, 12),
        "blocks.0.attn.proj.bias": (12,),
        "blocks.0.ls1.gamma": (12,),
        "blocks.0.norm2.weight": (12,),
        "blocks.0.norm2.bias": (12,),
        "blocks.0.mlp.fc1.weight": (48, 12),
        "blocks.0.mlp.fc1.bias": (48,),
        "blocks.0.mlp.fc2.weight": (12, 48),
        "blocks.0.mlp.fc2.bias": (12,),
        "blocks.0.ls2.gamma": (12,),
        "norm.weight": (12,),
        "norm.bias": (12,),
    }


def test_initial_weights() -> None:
    vit = _vit(embed_dim=192, num_heads=3, num_register_tokens=4, img_size=(32, 32), layer_scale_init=1e-5)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert vit.cls_token.abs().max() < 1e-5
    assert 0 < vit.register_tokens.abs().max() < 1e-5
    assert not vit.mask_token.any()
    block = vit.blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.mlp.fc1.bias.any()
    assert (block.ls1.gamma == 1e-5).all()
    assert vit.patch_embed.proj.weight.abs().max() <= (1 / (3 * 16)) ** 0.5  # torch's default for a convolution


def test_tokens_come_in_order_and_registers_have_no_position() -> None:
    vit = _vit(depth=1, num_register_tokens=2).eval()
    tokens: list[torch.Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda m, args: tokens.append(args[0][0]))
    images = torch.randn(1, 3, 8, 8)
    vit(images)
    (first,) = tokens
    torch.testing.assert_close(first[:, :1], vit.cls_token + vit.pos_embed[:, :1])
    torch.testing.assert_close(first[:, 1:3], vit.register_tokens)
    torch.testing.assert_close(first[:, 3:], vit.patch_embed(images) + vit.pos_embed[:, 1:])


def test_outputs_are_normed_and_cut_in_order() -> None:
    vit = _vit(num_register_tokens=2).eval()
    out = vit(torch.randn(3, 3, 8, 12))
    assert (out.cls_token.shape, out.register_tokens.shape, out.patch_tokens.shape) == ((3, 12), (3, 2, 12), (3, 6, 12))
    assert out.grid == (2, 3)
    torch.testing.assert_close(out.cls_token.mean(-1), torch.zeros(3), atol=1e-5, rtol=0)


def test_a_mask_replaces_its_patches_and_no_other() -> None:
    vit = _vit(depth=1).eval()
    with torch.no_grad():
        vit.mask_token.fill_(7.0)
    tokens: list[torch.Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda m, args: tokens.append(args[0][0]))
    images = torch.randn(2, 3, 8, 8)
    masks = torch.tensor([[True, False, False, True], [False] * 4])
    vit(images, masks)
    vit(images)
    masked, plain = (t[:, 1:] for t in tokens)
    torch.testing.assert_close(masked[masks], (7.0 + vit.pos_embed[:, 1:].expand(2, -1, -1))[masks])
    assert torch.equal(masked[~masks], plain[~masks])


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    assert _vit(in_chans=channels)(torch.randn(2, channels, 8, 8)).cls_token.shape == (2, 12)


def test_several_views_equal_one_forward_each() -> None:
    vit = _vit().eval()
    views, masks = [torch.randn(4, 3, 8, 8), torch.randn(6, 3, 4, 4)], [torch.rand(4, 4) < 0.5, None]
    for got, view, mask in zip(vit.forward_views(views, masks), views, masks, strict=True):
        assert torch.equal(got.cls_token, vit(view, mask).cls_token)
        assert torch.equal(got.patch_tokens, vit(view, mask).patch_tokens)


@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
def test_picked_tokens_equal_those_of_whole_views(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setitem(KERNELS, "dense", dense)  # packed: both views in one pass
    vit = _vit(depth=3, num_register_tokens=2, drop_path_rate=0.4).double().train()
    views = [torch.randn(4, 3, 8, 8).double(), torch.randn(6, 3, 4, 4).double()]
    masks = [torch.rand(4, 4) < 0.5, None]
    patches = [torch.tensor([14, 1, 5]), None]

    def run(pick: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        picked = pick(views, masks, patches)
        assert [p.patches.shape for p in picked] == [(3, 12), (0, 12)]
        tokens = [tokens for p in picked for tokens in p]
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in tokens)
        return [*tokens, *torch.autograd.grad(loss, list(vit.parameters()))]  # type: ignore[arg-type]

    expected = run(functools.partial(Backbone.pick_tokens, vit))  # the plain way: whole views, one after the other
    vit.execution = Execution(attention=kernel)
    for got, plain in zip(run(vit.pick_tokens), expected, strict=True):
        torch.testing.assert_close(got, plain)


def test_packed_attention_is_for_training_alone() -> None:
    """A model trained with it on CUDA is evaluated anywhere, and its teacher has crops of one size."""
    images, patches = [torch.randn(2, 3, 8, 8)], [torch.tensor([1, 6])]
    vit, packed = _vit().eval(), _vit().eval()
    packed.execution = Execution(attention="varlen")
    torch.testing.assert_close(packed(images[0]).cls_token, vit(images[0]).cls_token, rtol=0, atol=0)
    (expected,), (got,) = vit.pick_tokens(images, [None], patches), packed.pick_tokens(images, [None], patches)
    assert torch.equal(got.patches, expected.patches)
    with pytest.raises(ValueError, match="MODEL.ATTENTION varlen does not work on cpu"):
        packed.train().pick_tokens(images, [None], patches)


def test_what_was_not_picked_has_no_last_feed_forward() -> None:
    vit = _vit(depth=2).eval()
    rows: list[int] = []
    for block in vit.blocks:
        block.mlp.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    vit.pick_tokens([torch.randn(3, 3, 8, 8)], [None], [torch.tensor([7])])
    assert rows == [3 * 5, 3 + 1]


def test_intermediate_layers() -> None:
    vit = _vit(depth=3).eval()
    images = torch.randn(2, 3, 8, 8)
    last, before = vit(images), vit.get_intermediate_layers(images, 2)
    assert torch.equal(before[-1].cls_token, last.cls_token)
    picked = vit.get_intermediate_layers(images, [0, 2], norm=False)
    torch.testing.assert_close(vit.norm(picked[1].patch_tokens), last.patch_tokens)
    assert torch.equal(vit.get_intermediate_layers(images, [1])[0].cls_token, before[0].cls_token)
    for wrong in (0, 4, [3], [-1], []):
        with pytest.raises(ValueError, match=r"has blocks 0\.\.2"):
            vit.get_intermediate_layers(images, wrong)


def test_the_residual_stream_stays_fp32_under_autocast() -> None:
    vit = _vit(layer_scale_init=1e-5, num_register_tokens=1)
    streams: list[torch.dtype] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda m, i, o: streams.append(o[0].dtype))
        block.attn.register_forward_hook(lambda m, i, o: streams.append(o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vit(torch.randn(2, 3, 8, 8), torch.rand(2, 4) < 0.5)
    assert streams == [torch.bfloat16, torch.float32] * 2
    assert out.cls_token.dtype == torch.float32


def test_the_early_signal_survives_bf16() -> None:
    # With LayerScale at 1e-5 a bf16 stream would make all CLS tokens equal.
    vit = _vit(layer_scale_init=1e-5).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = vit(torch.randn(8, 3, 8, 8)).cls_token
    assert half.std(0).max() > 1e-6


def test_drop_path_rates() -> None:
    assert [b.drop_path_rate for b in _vit(depth=3, drop_path_rate=0.3).blocks] == [0.3, 0.3, 0.3]
    rising = [b.drop_path_rate for b in _vit(depth=3, drop_path_rate=0.3, drop_path_uniform=False).blocks]
    assert rising == pytest.approx([0.0, 0.15, 0.3])


@pytest.mark.parametrize(
    ("name", "layer_id", "decay", "role"),
    [
        ("cls_token", 0, True, ""),
        ("pos_embed", 0, True, ""),
        ("mask_token", 0, True, ""),
        ("register_tokens", 0, True, ""),
        ("patch_embed.proj.weight", 0, True, "patch_embed"),
        ("patch_embed.proj.bias", 0, False, "patch_embed"),
        ("blocks.0.norm1.weight", 1, False, ""),
        ("blocks.1.attn.qkv.weight", 2, True, ""),
        ("blocks.1.attn.qkv.bias", 2, False, ""),
        ("blocks.1.ls2.gamma", 2, False, ""),
        ("norm.weight", 3, False, ""),
        ("norm.bias", 3, False, ""),
    ],
)
def test_facts_about_parameters(name: str, layer_id: int, decay: bool, role: str) -> None:
    vit = _vit(num_register_tokens=1)
    assert name in dict(vit.named_parameters())
    facts = vit.param_facts(name)
    assert (facts.layer_id, facts.num_layers, facts.weight_decay, facts.role) == (layer_id, 2, decay, role)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="ffn must be one of mlp, swiglu; got 'gelu'"):
        _vit(ffn="gelu")
    with pytest.raises(ValueError, match=r"img_size \(8, 9\) is not a multiple of patch_size 4"):
        _vit(img_size=(8, 9))


def test_a_config_decides_everything_and_the_teacher_drops_nothing(tiny_cfg) -> None:
    tiny_cfg.merge_from_list(
        ["MODEL.VIT.DROP_PATH_RATE", 0.2, "MODEL.VIT.POS_EMBED_SIZE_PX", "(12,16)", "MODEL.VIT.NUM_REGISTER_TOKENS", 2]
    )
    student, teacher = build_backbone(tiny_cfg), build_backbone(tiny_cfg, for_teacher=True)
    assert isinstance(student, VisionTransformer)
    assert student.table_grid == (3, 4)
    assert student.embed_dim == 16
    assert [b.drop_path_rate for b in student.blocks] == [0.2]
    assert [b.drop_path_rate for b in teacher.blocks] == [0.0]  # type: ignore[union-attr]
    assert student.state_dict().keys() == teacher.state_dict().keys()
