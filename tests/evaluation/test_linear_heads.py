from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import get_cfg
from dinoengine.evaluation import HeadGrid, LinearHeads
from dinoengine.modeling import FeatureModel, VisionTransformer, head_input, last_outputs
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from tests.evaluation.fakes import identity_features

DIM, CLASSES, BATCH, STEPS = 6, 5, 8, 12
GRID = HeadGrid(base_lrs=(1e-5, 0.1, 3.0), num_last_blocks=(1, 4), mean_patch=(False, True))


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, GRID.width_in_tokens * DIM, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def _factor(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _trained(grid: HeadGrid, columns: slice = slice(None)) -> LinearHeads:
    heads = LinearHeads(grid, DIM, CLASSES, seed=3)
    for step, (features, labels) in enumerate(_batches()):
        heads.step(features[:, columns], labels, batch_size=BATCH, lr_factor=_factor(step))
    return heads


def _head(heads: LinearHeads, number: int) -> tuple[Tensor, Tensor]:
    """Weight [C, width] and bias [C] of one head."""
    state = heads.state_dict()["parameters"]
    group, lr = divmod(number, len(heads.grid.base_lrs))
    return state[group][lr], state[group + len(heads.grid.inputs)][lr]


def _alone(weight: Tensor, columns: slice, lr: float) -> tuple[nn.Linear, list[float]]:
    """The same training of one head with autograd, torch's SGD and torch's cosine."""
    linear = nn.Linear(weight.shape[1], CLASSES)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0)
    losses = []
    for features, labels in _batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features[:, columns]), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return linear, losses


# DIM columns per token: CLS of the blocks 9, 10, 11, 12, then the mean patch token.
COLUMNS = [slice(3 * DIM, 4 * DIM), slice(3 * DIM, 5 * DIM), slice(0, 4 * DIM), slice(0, 5 * DIM)]


@pytest.mark.parametrize("number", range(12))
def test_every_head_is_trained_as_if_it_were_alone(number: int) -> None:
    fresh = LinearHeads(GRID, DIM, CLASSES, seed=3)
    lr = GRID.base_lrs[number % 3] * BATCH / 256
    linear, losses = _alone(_head(fresh, number)[0], COLUMNS[number // 3], lr)
    weight, bias = _head(_trained(GRID), number)
    torch.testing.assert_close(weight, linear.weight.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bias, linear.bias.detach(), rtol=1e-6, atol=1e-7)
    features, labels = _batches()[0]
    first = fresh.step(features, labels, batch_size=BATCH, lr_factor=1.0)
    assert first[number].item() == pytest.approx(losses[0], rel=1e-6)


def test_a_head_does_not_depend_on_the_rest_of_the_grid() -> None:
    one = _trained(HeadGrid((0.1,), (1,), (True,)), slice(3 * DIM, 5 * DIM))
    torch.testing.assert_close(_head(one, 0), _head(_trained(GRID), 4), rtol=1e-6, atol=1e-8)


def test_heads_start_at_the_published_scale_with_zero_bias() -> None:
    heads = LinearHeads(HeadGrid((1.0, 2.0), (1,), (False,)), 500, 40)
    (weight, bias) = heads.state_dict()["parameters"]
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(weight.mean().item()) < 3e-4
    assert not bias.any()


def test_the_published_grid_has_52_heads_with_names_of_their_own() -> None:
    linear = get_cfg().TEST.LINEAR
    grid = HeadGrid(linear.BASE_LRS, linear.NUM_LAST_BLOCKS, linear.MEAN_PATCH)
    assert len(grid.heads) == len(set(grid.names)) == 52
    assert grid.names[:2] == ["blocks1-cls-lr1e-05", "blocks1-cls-lr2e-05"]
    # Rounded to five decimals these two would be one.
    close = HeadGrid((1.01e-05, 1.04e-05), (4,), (True,))
    assert close.names == ["blocks4-cls+mean-lr1.01e-05", "blocks4-cls+mean-lr1.04e-05"]


def test_features_hold_the_input_of_every_head() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=(8, 8), patch_size=4, embed_dim=DIM, depth=5, num_heads=2)
    model = FeatureModel(PixelNorm([0.5] * 3, [0.25] * 3), backbone).eval()
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        features = GRID.features(model, images)
        for seen in GRID.inputs:
            outputs = last_outputs(backbone, model.pixel_norm(images), seen.num_blocks)
            expected = head_input(outputs, seen.mean_patch)
            torch.testing.assert_close(features[:, GRID.columns(seen, DIM)], expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_patch_tokens_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"no patch tokens to average; set TEST\.LINEAR\.MEAN_PATCH \(False,\)"):
        HeadGrid((1.0,), (1,), (True,)).features(identity_features(3), torch.zeros(1, 1, 1, 3))


def test_ranks_tell_a_head_that_diverged_from_features_that_are_broken() -> None:
    heads = LinearHeads(HeadGrid((1.0, 2.0), (1,), (False,)), 3, 4)
    weight = torch.zeros(2, 4, 3)
    weight[0, 0, 0] = weight[0, 1, 1] = 1.0
    weight[1] = float("nan")
    state: dict[str, Any] = {"parameters": [weight, torch.zeros(2, 4)], "momenta": [weight, torch.zeros(2, 4)]}
    heads.load_state_dict(state)
    assert heads.diverged() == [False, True]
    features = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, float("inf"), 0.0]])
    ranks = heads.ranks(features, torch.tensor([1, 0, -1, 0]))
    assert ranks[:3].tolist() == [[0.0, 4.0], [1.0, 4.0], [4.0, 4.0]]
    assert ranks[3].isnan().all()
