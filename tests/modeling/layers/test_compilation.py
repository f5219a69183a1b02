"""torch.compile of the blocks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from dinoengine.modeling.backbone import Execution, VisionTransformer
from dinoengine.modeling.layers.block import Block
from dinoengine.modeling.layers.compilation import compile_modules


def _vit(compile_blocks: bool) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=(16, 16),
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        layer_scale_init=0.5,
        drop_path_rate=0.4,
        execution=Execution(compile_blocks=compile_blocks),
    ).train()


def _ramp(x: Tensor) -> Tensor:
    """A sum with a different weight for each element: that of normed tokens alone has no gradient but rounding."""
    return (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum()


def _step(vit: VisionTransformer, seed: int = 1) -> list[Tensor]:
    """Each seed masks another number of patches, as each batch does."""
    vit.zero_grad()
    torch.manual_seed(seed)
    views = [torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8)]
    masks = [torch.rand(4, 16) < 0.4, None]
    rows = masks[0].flatten().nonzero().flatten()  # type: ignore[union-attr]
    tokens = vit.pick_tokens(views, masks, [rows, None])
    sum(_ramp(t.cls_token) + _ramp(t.patches) for t in tokens).backward()  # type: ignore[union-attr]
    return [*(t.cls_token for t in tokens), *(p.grad for p in vit.parameters())]  # type: ignore[list-item]


def test_a_compiled_block_is_one_graph_that_all_blocks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend, fullgraph=True)
    )
    torch.compiler.reset()
    plain, compiled = _vit(False), _vit(True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for seed in (1, 1, 2, 3, 4):
        for got, expected in zip(_step(compiled, seed), _step(plain, seed), strict=True):
            torch.testing.assert_close(got, expected)
        # The last block, which runs on some tokens, and the others; the last once more when their number is no constant.
        assert len(graphs) == (2 if seed == 1 else 3)


@pytest.mark.slow
def test_compiled_code_computes_the_same() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    block = Block(8, 2, layer_scale_init=0.5)
    x = torch.randn(3, 5, 8)
    plan = block.plan(((3, 5),), [block.draw(3, x.device)], x.device)

    def step() -> list[Tensor]:
        block.zero_grad()
        (out,) = block([x], plan)
        _ramp(out).backward()
        return [out, *(p.grad for p in block.parameters())]  # type: ignore[list-item]

    expected = step()
    compile_modules([block])
    for got, plain in zip(step(), expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        ValueError, match=r"MODEL.COMPILE needs a C\+\+ compiler, and none of g\+\+, .*MODEL.COMPILE False"
    ):
        compile_modules([nn.Linear(1, 1)])
    monkeypatch.setenv("CXX", "/nowhere/cxx")
    with pytest.raises(ValueError, match="none of /nowhere/cxx was found"):
        compile_modules([nn.Linear(1, 1)])
