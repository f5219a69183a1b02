"""Each check of the recipe fails where its figure is wrong; that none fails as things are, test_checks.py shows."""

from __future__ import annotations

import dataclasses

import pytest

from dinoengine.config import defaults
from dinoengine.evaluation.numerics import recipe
from dinoengine.modeling import VisionTransformer
from dinoengine.modeling.backbone import VIT_SIZES
from dinoengine.structures import ParamFacts
from tests.evaluation.numerics.failures import failures


def test_a_missing_block_and_a_wrong_width_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIT_SIZES, "small", VIT_SIZES["small"]._replace(depth=11))
    monkeypatch.setitem(VIT_SIZES, "giant", VIT_SIZES["giant"]._replace(embed_dim=1408, num_heads=16))
    small = [f"{what}, dinov2_vits14{reg}" for reg in ("", "_reg4") for what in ("parameters", "tensors")]
    giant = ["parameters, dinov2_vitg14", "parameters, dinov2_vitg14_reg4"]
    assert failures(recipe.check_sizes) == [*small, *giant]


@pytest.mark.parametrize(
    ("group", "key", "value", "quantity"),
    [
        ("SOLVER", "WARMUP_ITERS", 12501, "LR, iteration 1249, short recipe"),
        ("SOLVER", "MIN_LR", 2e-6, "LR, iteration 100000, short recipe"),
        ("SOLVER", "LR_SCALING", "linear", "LR, iteration 1, short recipe"),
        ("SOLVER", "FREEZE_LAST_LAYER_ITERS", 1249, "last-layer LR, iteration 1249, short recipe"),
        ("SOLVER", "WEIGHT_DECAY_END", 0.401, "weight decay, iteration 100000, short recipe"),
        ("TEACHER", "MOMENTUM_END", 0.9999, "teacher momentum, iteration 100000, ViT-L/14 recipe"),
        ("TEACHER", "TEMP_WARMUP_ITERS", 40000, "teacher temperature, iteration 37500, short recipe"),
    ],
)
def test_another_default_fails(
    monkeypatch: pytest.MonkeyPatch, group: str, key: str, value: float | str, quantity: str
) -> None:
    node = defaults._C.MODEL.TEACHER if group == "TEACHER" else defaults._C[group]
    monkeypatch.setitem(node, key, value)
    assert quantity in failures(recipe.check_schedules)


def test_other_facts_about_parameters_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = VisionTransformer.param_facts

    def decay_norms(self: VisionTransformer, name: str) -> ParamFacts:
        facts = original(self, name)
        return dataclasses.replace(facts, weight_decay=facts.weight_decay or "norm" in name)

    monkeypatch.setattr(VisionTransformer, "param_facts", decay_norms)
    assert failures(recipe.check_param_groups) == ["parameters decayed otherwise, ViT-L"]

    def later(self: VisionTransformer, name: str) -> ParamFacts:
        facts = original(self, name)
        return dataclasses.replace(facts, layer_id=max(facts.layer_id, 1))

    monkeypatch.setattr(VisionTransformer, "param_facts", later)
    failed = failures(recipe.check_param_groups)
    assert "parameter groups, ViT-L backbone" in failed
    assert "LR multiplier, ViT-L, cls_token" in failed
    assert "LR multiplier, ViT-L, blocks.0.attn.qkv.weight" not in failed
