"""The projection head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dinoengine.modeling.heads import DINOHead
from dinoengine.modeling.heads.dino_head import WeightNormLinear


def test_weight_norm_equals_torchs() -> None:
    ours = WeightNormLinear(5, 7)
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2.0)
    theirs = weight_norm(nn.Linear(5, 7, bias=False))
    with torch.no_grad():
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)


@pytest.mark.parametrize(
    ("num_layers", "linears"), [(1, ["mlp.0"]), (2, ["mlp.0", "mlp.2"]), (3, ["mlp.0", "mlp.2", "mlp.4"])]
)
def test_layout(num_layers: int, linears: list[str]) -> None:
    head = DINOHead(6, num_prototypes=9, hidden_dim=8, bottleneck_dim=4, num_layers=num_layers)
    names = [f"{name}.{kind}" for name in linears for kind in ("weight", "bias")]
    assert list(head.state_dict()) == [*names, "last_layer.weight_g", "last_layer.weight_v"]
    assert head.state_dict()[names[-2]].shape == (4, 6 if num_layers == 1 else 8)
    assert head.last_layer.weight_v.shape == (9, 4)
    assert head.last_layer.weight_g.shape == (9, 1)


def test_initial_weights() -> None:
    head = DINOHead(192, num_prototypes=512, hidden_dim=256, bottleneck_dim=64)
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_g.requires_grad
    bound = 1 / 64**0.5  # kaiming-uniform of a linear layer with 64 inputs
    assert 0.95 * bound < head.last_layer.weight_v.abs().max() <= bound
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.mlp[0].bias.any()


def test_logits_are_cosines_while_g_is_1() -> None:
    head = DINOHead(6, num_prototypes=50, hidden_dim=8, bottleneck_dim=4)
    logits = head(torch.randn(20, 6) * 100)
    assert logits.abs().max() <= 1 + 1e-5
    bottleneck = head.mlp(torch.randn(20, 6))
    cosines = nn.functional.cosine_similarity(bottleneck[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head.last_layer(nn.functional.normalize(bottleneck, dim=-1)), cosines)


def test_any_leading_shape_and_no_rows() -> None:
    head = DINOHead(6, num_prototypes=5, hidden_dim=8, bottleneck_dim=4)
    assert head(torch.randn(2, 3, 6)).shape == (2, 3, 5)
    empty = head(torch.zeros(0, 6))
    assert empty.shape == (0, 5)
    empty.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_facts_about_parameters() -> None:
    head = DINOHead(6, num_prototypes=5, hidden_dim=8, bottleneck_dim=4)
    facts = {name: head.param_facts(name) for name, _ in head.named_parameters()}
    assert all(f.num_layers + 1 - f.layer_id == 0 for f in facts.values())
    assert [n for n, f in facts.items() if not f.weight_decay] == ["mlp.0.bias", "mlp.2.bias", "mlp.4.bias"]
    assert [n for n, f in facts.items() if f.role == "last_layer"] == ["last_layer.weight_g", "last_layer.weight_v"]
