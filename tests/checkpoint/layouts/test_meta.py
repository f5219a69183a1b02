"""Meta's layouts against names and shapes of the published files, written out here."""

from __future__ import annotations

from dataclasses import replace

import torch

from dinoengine.checkpoint.files import FileContent
from dinoengine.checkpoint.layouts import Hints, detect_layout
from dinoengine.checkpoint.layouts.meta import MetaBackbone, MetaTeacher, with_chunks, without_chunks
from tests.checkpoint.models import SMALL, random_weights

VITS14_REG4 = replace(
    SMALL,
    embed_dim=384,
    depth=12,
    num_heads=6,
    patch_size=14,
    table_grid=(37, 37),
    num_register_tokens=4,
    ffn_hidden=1536,
    interpolate_antialias=True,
    interpolate_offset=0.0,
)
# dinov2_vits14_reg4_pretrain.pth
OUTSIDE = {
    "cls_token": (1, 1, 384),
    "pos_embed": (1, 1370, 384),
    "register_tokens": (1, 4, 384),
    "mask_token": (1, 384),
    "patch_embed.proj.weight": (384, 3, 14, 14),
    "patch_embed.proj.bias": (384,),
    "norm.weight": (384,),
    "norm.bias": (384,),
}
BLOCK = {
    "norm1.weight": (384,),
    "norm1.bias": (384,),
    "attn.qkv.weight": (1152, 384),
    "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "ls1.gamma": (384,),
    "norm2.weight": (384,),
    "norm2.bias": (384,),
    "mlp.fc1.weight": (1536, 384),
    "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536),
    "mlp.fc2.bias": (384,),
    "ls2.gamma": (384,),
}


def test_the_published_file_is_read_and_written() -> None:
    shapes = OUTSIDE | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()}
    data = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    content = FileContent("dinov2_vits14_reg4_pretrain.pth", data)
    assert detect_layout(content).name == "meta"
    weights = MetaBackbone().read(content, Hints())
    assert (weights.spec, weights.missing, weights.unused) == (VITS14_REG4, [], [])
    written, lost = MetaBackbone().write(weights)
    assert lost == []
    assert {name: tuple(value.shape) for name, value in written.data.items()} == shapes


def test_chunks_count_blocks_over_all_of_them() -> None:
    entries = {f"blocks.{i}.norm1.bias": torch.full((1,), float(i)) for i in range(5)}
    chunked = with_chunks(entries, 5, 2)
    assert list(chunked) == [f"blocks.{chunk}.{i}.norm1.bias" for chunk, i in ((0, 0), (0, 1), (1, 2), (1, 3), (2, 4))]
    assert without_chunks(chunked) == entries


def test_names_of_a_teacher_checkpoint() -> None:
    weights = random_weights(heads=True)
    content, lost = MetaTeacher().write(weights)
    assert lost == []
    assert content.data.keys() == {"teacher"}
    teacher = content.data["teacher"]
    head = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias"]
    head += ["last_layer.weight_g", "last_layer.weight_v"]
    expected = {f"backbone.{name}" for name in weights.backbone}
    expected |= {f"{part}.{name}" for part in ("dino_head", "ibot_head") for name in head}
    assert teacher.keys() == expected
    assert detect_layout(content).name == "meta-teacher"


def test_what_lies_beside_the_teacher_is_accounted_for() -> None:
    content = MetaTeacher().write(random_weights())[0]
    content.data["epoch"] = 3
    assert MetaTeacher().read(content, Hints()).unused == ["epoch"]
