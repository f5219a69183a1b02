"""A block on several groups: packed or not, all tokens or some, with the same stochastic depth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.layers.attention_kernels import KERNELS
from dinoengine.modeling.layers.block import Block, Draws
from dinoengine.modeling.layers.drop_path import KeptSamples, add_kept, take_kept
from tests.modeling.layers.dense import dense

SHAPES = ((5, 4), (6, 3))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _dense_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "dense", dense)


def _block(rate: float) -> Block:
    torch.manual_seed(0)
    return Block(8, 2, layer_scale_init=0.5, drop_path_rate=rate).double().train()


def _groups() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, t, 8, dtype=torch.float64, generator=generator).requires_grad_() for b, t in SHAPES]


def _gradients(block: Block, groups: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
    return list(torch.autograd.grad(loss, [*groups, *block.parameters()]))  # type: ignore[arg-type]


def _slow(block: Block, groups: list[Tensor], draws: list[Draws]) -> list[Tensor]:
    """Sample by sample."""
    outputs = []
    for x, draw in zip(groups, draws, strict=True):
        for kept, branch in ((draw.attention, "attention"), (draw.ffn, "ffn")):
            rows = []
            for i in range(len(x)):
                if kept is not None and i not in kept.indices.tolist():
                    rows.append(x[i])
                    continue
                if branch == "attention":
                    qkv = block.attn.qkv(block.norm1(x[i]))
                    attended = dense(qkv, 2, Block.plan(((1, x.shape[1]),), [Draws(None, None)], CPU).layouts[0])
                    residual = block.ls1(block.attn.proj(attended))
                else:
                    residual = block.ls2(block.mlp(block.norm2(x[i])))
                rows.append(x[i] + residual * (1.0 if kept is None else kept.scale))
            x = torch.stack(rows)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("is_picked", [False, True])
def test_every_way_equals_the_loop_over_samples(kernel: str, rate: float, is_picked: bool) -> None:
    block = _block(rate)
    torch.manual_seed(2)
    draws = [block.draw(b, CPU) for b, _ in SHAPES]
    picked = [torch.tensor([0, 4, 19, 7, 8]), torch.tensor([17, 2])] if is_picked else None

    groups = _groups()
    expected = _slow(block, groups, draws)
    if picked is not None:
        expected = [x.flatten(0, 1)[rows] for x, rows in zip(expected, picked, strict=True)]
    expected_gradients = _gradients(block, groups, expected)

    groups = _groups()
    got = block(groups, block.plan(SHAPES, draws, CPU, kernel), picked)
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain)
    for mine, plain in zip(_gradients(block, groups, got), expected_gradients, strict=True):
        torch.testing.assert_close(mine, plain)


def test_packed_groups_go_through_each_layer_once() -> None:
    block = _block(0.0)
    seen: list[int] = []
    block.mlp.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    block(_groups(), block.plan(SHAPES, [Draws(None, None)] * 2, CPU, "dense"))
    block(_groups())
    assert seen == [5 * 4 + 6 * 3, 5 * 4, 6 * 3]


def test_without_a_plan_the_draws_are_the_next_ones() -> None:
    block = _block(0.4)
    groups = _groups()
    torch.manual_seed(5)
    draws = [block.draw(b, CPU) for b, _ in SHAPES]
    expected = block(groups, block.plan(SHAPES, draws, CPU))
    torch.manual_seed(5)
    for mine, theirs in zip(block(groups), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_kept_samples_are_taken_and_added_back() -> None:
    kept = KeptSamples(torch.tensor([2, 0]), 1.5)
    x = torch.arange(3.0)[:, None]
    assert take_kept(x, kept).tolist() == [[2.0], [0.0]]
    assert add_kept(x, torch.tensor([[10.0], [20.0]]), kept).tolist() == [[30.0], [1.0], [17.0]]
