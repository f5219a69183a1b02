"""Heads are recognised by their shapes, and every entry of them is accounted for."""

from __future__ import annotations

import pytest
import torch

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.heads import HeadShape, head_arguments, head_shape
from dinoengine.checkpoint.infer import make_weights
from dinoengine.modeling.heads.dino_head import DINOHead
from tests.checkpoint.models import random_weights


def _head(width: int, classes: int = 6) -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(classes, width), "bias": torch.zeros(classes)}


@pytest.mark.parametrize(
    "times, blocks, mean_patch", [(1, 1, False), (2, 1, True), (4, 4, False), (5, 4, True)], ids=str
)
def test_the_width_says_what_a_head_sees(times: int, blocks: int, mean_patch: bool) -> None:
    assert head_shape(_head(times * 384), 384, "head.pth") == HeadShape(6, blocks, mean_patch)


def test_a_head_of_another_backbone_is_refused() -> None:
    for width in (3 * 384, 2 * 768 + 1, 6 * 384):
        with pytest.raises(CheckpointError, match=rf"is {width} wide.* would be 384, 768, 1536, 1920; it belongs to"):
            head_shape(_head(width), 384, "head.pth")


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_what_a_head_was_built_with(num_layers: int) -> None:
    given = {"num_prototypes": 12, "hidden_dim": 20, "bottleneck_dim": 8, "num_layers": num_layers}
    if num_layers == 1:
        given["hidden_dim"] = 8  # there is no hidden layer
    assert head_arguments(DINOHead(64, **given).state_dict()) == given


def test_a_head_is_accounted_for_like_a_backbone() -> None:
    weights = random_weights(heads=True)
    del weights.parts["dino_head"]["mlp.2.bias"]
    weights.parts["dino_head"]["junk"] = torch.zeros(1)
    given = {part: dict(entries) for part, entries in weights.parts.items()}
    read = make_weights("meta-teacher", "x.pth", weights.parts, antialias=False, offset=0.1)
    assert (read.missing, read.unused) == (["dino_head.mlp.2.bias"], ["dino_head.junk"])
    assert "junk" not in read.parts["dino_head"]
    assert {part: entries.keys() for part, entries in weights.parts.items()} == {p: e.keys() for p, e in given.items()}


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("mlp.0.weight", (20, 63), r"dino_head\.mlp\.0\.weight \[20, 63\] \(expected \[20, 64\]\)"),
        ("last_layer.weight_g", (11, 1), r"dino_head\.last_layer\.weight_g \[11, 1\] \(expected \[12, 1\]\)"),
        ("last_layer.weight_v", None, r"x\.pth has a dino_head that is no DINO head.*it has mlp"),
    ],
)
def test_a_head_of_another_shape_names_the_file(name: str, shape: tuple[int, ...] | None, problem: str) -> None:
    weights = random_weights(heads=True)
    if shape is None:
        del weights.parts["dino_head"][name]
    else:
        weights.parts["dino_head"][name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=problem):
        make_weights("meta-teacher", "x.pth", weights.parts, antialias=False, offset=0.1)


def test_a_head_saved_by_the_newer_weight_norm() -> None:
    weights = random_weights(heads=True)
    head = dict(weights.parts["dino_head"])
    for i, leaf in enumerate(("g", "v")):
        head[f"last_layer.parametrizations.weight.original{i}"] = head.pop(f"last_layer.weight_{leaf}")
    read = make_weights("meta", "x.pth", {**weights.parts, "dino_head": head}, antialias=False, offset=0.1)
    assert (read.missing, read.unused) == ([], [])
    assert all(torch.equal(read.parts["dino_head"][n], v) for n, v in weights.parts["dino_head"].items())


def test_a_linear_head_is_accounted_for() -> None:
    head = {"weight": torch.zeros(5, 64), "scale": torch.zeros(1)}
    parts = {**random_weights().parts, "linear_head": head}
    read = make_weights("dinoengine", "x.pth", parts, antialias=False, offset=0.1)
    assert (read.missing, read.unused) == (["linear_head.bias"], ["linear_head.scale"])
    parts["linear_head"] = {"weight": torch.zeros(5, 64), "bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"linear_head\.bias \[4\] \(expected \[5\]\)"):
        make_weights("dinoengine", "x.pth", parts, antialias=False, offset=0.1)
