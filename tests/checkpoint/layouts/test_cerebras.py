"""The Cerebras layout against names and shapes written out here; a round trip alone would agree with any names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.files import FileContent
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.cerebras import Cerebras
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from tests.checkpoint.models import SMALL, random_entries, random_weights

# Patch embedding [D, C, p, p] -> [D, p * p * C], positions [1, 1 + N, D] -> [N + 1, D], tokens -> [D].
TRUNK = {
    "embedding_layer.cls_embedding": (64,),
    "embedding_layer.mask_token": (64,),
    "embedding_layer.position_embeddings.weight": (17, 64),
    "embedding_layer.linear_proj.weight": (64, 147),
    "embedding_layer.linear_proj.bias": (64,),
    "encoder.transformer_encoder.norm.weight": (64,),
    "encoder.transformer_encoder.norm.bias": (64,),
}
# Ours -> theirs below encoder.transformer_encoder.layers.{i}.
LAYER = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.weight": "self_attn.proj_output_dense_layer.weight",
    "attn.proj.bias": "self_attn.proj_output_dense_layer.bias",
    "ls1.gamma": "layer_scale1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "ffn.ffn.0.linear_layer.weight",
    "mlp.fc1.bias": "ffn.ffn.0.linear_layer.bias",
    "mlp.fc2.weight": "ffn.ffn.1.linear_layer.weight",
    "mlp.fc2.bias": "ffn.ffn.1.linear_layer.bias",
    "ls2.gamma": "layer_scale2",
}
HEADS = {"dino_head": 0, "student.dino_head": 1, "ibot_head": 2, "student.ibot_head": 3}


def _full(spec: BackboneSpec = SMALL) -> Weights:
    weights = random_weights(spec, heads=True)
    weights.parts["student.backbone"] = random_entries(spec.build(), seed=5)
    for name in ("dino_head", "ibot_head"):
        weights.parts[f"student.{name}"] = {k: v + 1 for k, v in weights.parts[name].items()}
    weights.parts["centers"] = {"dino": torch.randn(1, 12), "ibot": torch.randn(1, 13)}
    return weights


def _written(weights: Weights) -> dict[str, torch.Tensor]:
    content, lost = Cerebras().write(weights)
    assert lost == []
    assert content.data.keys() == {"model"}
    model: dict[str, torch.Tensor] = content.data["model"]
    return model


def test_every_name_and_shape_is_that_of_their_files() -> None:
    weights = _full()
    model = _written(weights)
    expected: dict[str, tuple[int, ...]] = {}
    for i, part in enumerate(("backbone", "student.backbone")):
        trunk = f"image_model_trunks.model.{i}."
        expected |= {trunk + name: shape for name, shape in TRUNK.items()}
        for block in range(3):
            layer = f"{trunk}encoder.transformer_encoder.layers.{block}."
            for ours, theirs in LAYER.items():
                entry = weights.parts[part][f"blocks.{block}.{ours}"]
                expected[layer + theirs] = tuple(entry.shape)
                assert torch.equal(model[layer + theirs], entry)
            for letter, rows in (("q", slice(0, 64)), ("k", slice(64, 128)), ("v", slice(128, 192))):
                for leaf, shape in (("weight", (64, 64)), ("bias", (64,))):
                    name = f"{layer}self_attn.proj_{letter}_dense_layer.{leaf}"
                    expected[name] = shape
                    assert torch.equal(model[name], weights.parts[part][f"blocks.{block}.attn.qkv.{leaf}"][rows])
        assert torch.equal(model[f"{trunk}encoder.transformer_encoder.norm.weight"], weights.parts[part]["norm.weight"])
    for part, i in HEADS.items():
        for name, value in weights.parts[part].items():
            expected[f"heads.model.{i}.{name}"] = tuple(value.shape)
            assert torch.equal(model[f"heads.model.{i}.{name}"], value)
    expected |= {"losses.model.0.center": (12,), "losses.model.1.center": (13,)}
    expected |= {"ema_step": (1,), "losses.model.0.step": (1,), "losses.model.1.step": (1,)}
    assert {name: tuple(value.shape) for name, value in model.items()} == expected
    assert torch.equal(model["losses.model.1.center"], weights.parts["centers"]["ibot"][0])


def test_the_class_token_is_the_last_position() -> None:
    weights = random_weights()
    table = _written(weights)["image_model_trunks.model.0.embedding_layer.position_embeddings.weight"]
    assert torch.equal(table[16], weights.backbone["pos_embed"][0, 0])
    assert torch.equal(table[0], weights.backbone["pos_embed"][0, 1])
    assert torch.equal(table[15], weights.backbone["pos_embed"][0, 16])


def test_a_kernel_by_hand() -> None:
    """2 x 2 pixels of 3 channels: rows, then columns, the channels innermost."""
    weights = random_weights(replace(SMALL, patch_size=2))
    kernel = torch.zeros(64, 3, 2, 2)
    kernel[0] = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]], [[20.0, 21.0], [22.0, 23.0]]])
    weights.backbone["patch_embed.proj.weight"] = kernel
    row = _written(weights)["image_model_trunks.model.0.embedding_layer.linear_proj.weight"][0]
    assert row.tolist() == [0, 10, 20, 1, 11, 21, 2, 12, 22, 3, 13, 23]


def test_a_file_of_theirs_comes_in() -> None:
    """Entries that we never write are dropped by name (recomputed tables, counters), not by pattern."""
    weights = _full()
    model = _written(weights)
    model["image_model_trunks.model.0.embedding_layer.interpolation_matrix"] = torch.zeros(2)
    model["surprise"] = torch.zeros(1)
    read = Cerebras().read(FileContent("x.mdl", {"model": model}), Hints())
    assert (read.missing, read.unused) == ([], ["surprise"])
    assert (read.spec, read.parts.keys()) == (SMALL, weights.parts.keys())
    for part, entries in weights.parts.items():
        assert all(torch.equal(read.parts[part][name], value) for name, value in entries.items())


def test_what_a_training_keeps_beside_the_model_is_left_out_by_name() -> None:
    data = {"model": _written(random_weights()), "optimizer": {}, "global_step": 7}
    assert Cerebras().read(FileContent("x.mdl", data), Hints()).left_out == ["optimizer", "global_step"]


def test_without_a_teacher_it_is_refused(tmp_path: Path) -> None:
    model = {n.replace("model.0.", "model.1."): v for n, v in _written(random_weights()).items()}
    torch.save({"model": model}, tmp_path / "x.mdl")
    with pytest.raises(CheckpointError, match=r"x\.mdl has no teacher trunk"):
        read_weights(str(tmp_path / "x.mdl"))
