from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.modeling.backbone import VIT_SIZES, VisionTransformer
from dinoengine.modeling.heads.dino_head import DINOHead
from dinoengine.solver import param_groups
from dinoengine.structures import ParamFacts


class Stating(nn.Module):
    """A model that states given facts about parameters of given names."""

    def __init__(self, facts: dict[str, ParamFacts]) -> None:
        super().__init__()
        self.facts = facts
        for name in facts:
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))

    def param_facts(self, name: str) -> ParamFacts:
        return self.facts[name]


def _group_of(groups: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [group for group in groups if name in group["param_names"]]
    assert len(found) == 1, (name, len(found))
    return found[0]


@pytest.fixture(scope="module")
def vit_large() -> VisionTransformer:
    size = VIT_SIZES["large"]
    with torch.device("meta"):
        return VisionTransformer(
            img_size=(224, 224),
            patch_size=16,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            num_register_tokens=4,
        )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cls_token", 0.07179),
        ("pos_embed", 0.07179),
        ("mask_token", 0.07179),
        ("register_tokens", 0.07179),
        ("patch_embed.proj.weight", 0.01436),
        ("patch_embed.proj.bias", 0.01436),
        ("blocks.0.attn.qkv.weight", 0.07977),
        ("blocks.23.mlp.fc2.bias", 0.9),
        ("norm.weight", 1.0),
    ],
)
def test_published_lr_multipliers_of_vit_large(vit_large: VisionTransformer, name: str, expected: float) -> None:
    groups = param_groups(vit_large, layer_decay=0.9, patch_embed_lr_mult=0.2)
    assert _group_of(groups, name)["lr_mult"] == pytest.approx(expected, abs=5e-6)


def test_vit_large_has_the_published_52_groups(vit_large: VisionTransformer) -> None:
    groups = param_groups(vit_large, layer_decay=0.9, patch_embed_lr_mult=0.2)
    assert len(groups) == 52
    keys = {(g["lr_mult"], g["wd_mult"], g["is_last_layer"]) for g in groups}
    assert len(keys) == 52
    assert not any(g["is_last_layer"] for g in groups)


def test_without_layer_decay_only_the_patch_embedding_has_its_own_rate(vit_large: VisionTransformer) -> None:
    groups = param_groups(vit_large, layer_decay=1.0, patch_embed_lr_mult=0.2)
    assert {(g["lr_mult"], g["wd_mult"]) for g in groups} == {(1.0, 1.0), (1.0, 0.0), (0.2, 1.0), (0.2, 0.0)}


def test_weight_decay_spares_biases_norms_and_layer_scale_but_not_tokens(vit_large: VisionTransformer) -> None:
    groups = param_groups(vit_large, layer_decay=0.9)
    # The rule of the published code, read from the names: ".bias" at the end, "norm" or "gamma" anywhere.
    for group in groups:
        for name in group["param_names"]:
            spared = name.endswith(".bias") or "norm" in name or "gamma" in name
            assert group["wd_mult"] == (0.0 if spared else 1.0), name
    for token in ("cls_token", "pos_embed", "mask_token", "register_tokens"):
        assert _group_of(groups, token)["wd_mult"] == 1.0


def test_the_order_of_layers_is_the_order_of_learning_rates(vit_large: VisionTransformer) -> None:
    groups = param_groups(vit_large, layer_decay=0.9, patch_embed_lr_mult=0.2)
    by_depth = [_group_of(groups, f"blocks.{i}.attn.qkv.weight")["lr_mult"] for i in range(24)]
    by_depth = [_group_of(groups, "cls_token")["lr_mult"], *by_depth, _group_of(groups, "norm.weight")["lr_mult"]]
    ratios = [below / above for below, above in itertools.pairwise(by_depth)]
    assert ratios == pytest.approx([0.9] * 25)


def test_head_keeps_the_full_rate_and_only_the_prototypes_are_the_last_layer() -> None:
    with torch.device("meta"):
        head = DINOHead(8, num_prototypes=5, hidden_dim=6, bottleneck_dim=4)
    groups = param_groups(head, layer_decay=0.5, patch_embed_lr_mult=0.1)
    assert {g["lr_mult"] for g in groups} == {1.0}
    last = [name for g in groups if g["is_last_layer"] for name in g["param_names"]]
    assert sorted(last) == ["last_layer.weight_g", "last_layer.weight_v"]
    assert _group_of(groups, "last_layer.weight_g")["wd_mult"] == 1.0  # decayed, as published
    assert _group_of(groups, "mlp.0.bias")["wd_mult"] == 0.0


def test_every_trainable_parameter_is_in_exactly_one_group(vit_large: VisionTransformer) -> None:
    groups = param_groups(vit_large, layer_decay=0.9, patch_embed_lr_mult=0.2)
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in vit_large.parameters()}
    by_name = dict(vit_large.named_parameters())
    for group in groups:
        assert [id(by_name[n]) for n in group["param_names"]] == [id(p) for p in group["params"]]


def test_group_keys_come_from_the_three_facts() -> None:
    model = Stating(
        {
            "early": ParamFacts(layer_id=0, num_layers=1),
            "patch": ParamFacts(layer_id=0, num_layers=1, role="patch_embed"),
            "block": ParamFacts(layer_id=1, num_layers=1, weight_decay=False),
            "final": ParamFacts(layer_id=2, num_layers=1),
            "also_final": ParamFacts(layer_id=2, num_layers=1),
            "prototypes": ParamFacts(role="last_layer"),
        }
    )
    groups = param_groups(model, layer_decay=0.5, patch_embed_lr_mult=0.1)
    facts = [(g["param_names"], g["lr_mult"], g["wd_mult"], g["is_last_layer"]) for g in groups]
    assert facts == [
        (["early"], 0.25, 1.0, False),
        (["patch"], pytest.approx(0.025), 1.0, False),
        (["block"], 0.5, 0.0, False),
        (["final", "also_final"], 1.0, 1.0, False),
        (["prototypes"], 1.0, 1.0, True),
    ]


def test_frozen_parameters_are_left_out() -> None:
    model = Stating({"a": ParamFacts(), "b": ParamFacts()})
    model.a.requires_grad_(False)
    assert [g["param_names"] for g in param_groups(model)] == [["b"]]


def test_a_shared_parameter_is_optimised_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    grouped = [p for g in param_groups(model) for p in g["params"]]
    assert len(grouped) == 3
    torch.optim.AdamW(param_groups(model))  # refuses parameters that come twice


def test_a_model_that_states_nothing_decays_all_but_one_dimensional_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = param_groups(model, layer_decay=0.5, patch_embed_lr_mult=0.1)
    assert {g["lr_mult"] for g in groups} == {1.0}
    decayed = {name: g["wd_mult"] for g in groups for name in g["param_names"]}
    assert {name for name, mult in decayed.items() if mult} == {"0.weight", "3.weight"}
    assert {name for name, mult in decayed.items() if not mult} == {"0.bias", "1.weight", "1.bias", "3.bias"}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.ReLU())
