"""Files of DINO and iBOT as their trainings write them, names written out here."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.convert import convert, save_weights
from dinoengine.checkpoint.layouts import read_weights
from tests.checkpoint.models import WITHOUT_SCALE, random_entries, random_weights

BLOCK = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
BLOCK += ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
OUTSIDE = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
NAMES = {*OUTSIDE, *(f"blocks.{i}.{name}" for i in range(3) for name in BLOCK)}


def _backbone(seed: int) -> dict[str, Tensor]:
    entries = random_entries(WITHOUT_SCALE.build(), seed)
    del entries["mask_token"]
    return entries


def _training(seed: int = 0) -> dict[str, Any]:
    """checkpoint.pth of main_dino.py: the student is inside DDP, both sides are multi-crop wrappers."""
    head = random_weights(WITHOUT_SCALE, heads=True).parts["dino_head"]
    teacher = {f"backbone.{n}": v for n, v in _backbone(seed).items()} | {f"head.{n}": v for n, v in head.items()}
    student = {f"module.{n}": v + 1 for n, v in teacher.items()}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=0.0005),
        "dino_loss": {"center": torch.randn(1, 12)},
        "fp16_scaler": {"scale": 2.0},
    }


def _save(path: Path, data: dict[str, Any]) -> str:
    torch.save(data, path)
    return str(path)


def test_a_training_checkpoint_with_both_sides_head_and_centre(tmp_path: Path) -> None:
    data = _training()
    weights = read_weights(_save(tmp_path / "checkpoint.pth", data))
    assert weights.layout == "dino"
    assert (weights.missing, weights.unused) == ([], [])
    assert weights.parts.keys() == {"backbone", "dino_head", "student.backbone", "student.dino_head", "centers"}
    assert torch.equal(weights.backbone["norm.bias"], data["teacher"]["backbone.norm.bias"])
    assert torch.equal(weights.parts["student.backbone"]["norm.bias"], data["student"]["module.backbone.norm.bias"])
    head = weights.parts["student.dino_head"]["last_layer.weight_v"]
    assert torch.equal(head, data["student"]["module.head.last_layer.weight_v"])
    assert torch.equal(weights.parts["centers"]["dino"], data["dino_loss"]["center"])
    assert sorted(weights.left_out) == ["args", "epoch", "fp16_scaler", "optimizer"]


def test_what_is_beside_a_teacher_and_is_not_known_is_named(tmp_path: Path) -> None:
    data = _training() | {"ibot_loss": {"center2": torch.zeros(1, 1, 12)}, "queue": torch.zeros(3)}
    assert read_weights(_save(tmp_path / "x.pth", data)).unused == ["ibot_loss", "queue"]
    with pytest.raises(CheckpointError, match=r"2 without a place: ibot_loss, queue"):
        convert(str(tmp_path / "x.pth"), str(tmp_path / "out.pth"), "meta")


def test_arguments_are_data_and_other_objects_stay_refused(tmp_path: Path) -> None:
    data = _training()
    data["args"].started = datetime.date(2021, 4, 29)
    with pytest.raises(CheckpointError, match=r"was refused(?s:.)*found: datetime\.date"):
        read_weights(_save(tmp_path / "x.pth", data))


@pytest.mark.parametrize("key", ["teacher", "student", "state_dict"])
def test_one_side_alone_is_the_backbone(key: str, tmp_path: Path) -> None:
    entries = _backbone(0)
    prefix = "module.backbone." if key == "student" else "backbone."
    head = {"head.mlp.0.bias": torch.zeros(3)} if key == "teacher" else {}
    data = {key: {f"{prefix}{name}": value for name, value in entries.items()} | head}
    weights = read_weights(_save(tmp_path / "x.pth", data), "dino")
    assert all(torch.equal(weights.backbone[name], value) for name, value in entries.items())
    assert weights.unused == list(head)


@pytest.mark.parametrize(("layout", "extra"), [("dino", set()), ("ibot", {"masked_embed"})])
def test_every_name_is_that_of_their_files(layout: str, extra: set[str], tmp_path: Path) -> None:
    save_weights(random_weights(WITHOUT_SCALE), str(tmp_path / "x.pth"), layout, allow=["mask_token"])
    assert torch.load(tmp_path / "x.pth").keys() == NAMES | extra
