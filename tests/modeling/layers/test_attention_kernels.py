"""Attention of packed sequences beside the plain block-diagonal mask, and the rule that chooses a kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.layers import attention_kernels
from dinoengine.modeling.layers.attention_kernels import KERNELS, choose_kernel, make_layout
from tests.modeling.layers.dense import dense

GROUPS = ((2, 5), (3, 2), (1, 7))
ROWS = 23
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _with_gradient(kernel: str, qkv: Tensor, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    function = dense if kernel == "dense" else KERNELS[kernel]
    out = function(qkv, heads, make_layout(kernel, GROUPS, device))
    (gradient,) = torch.autograd.grad((out * torch.arange(out.shape[0], device=device)[:, None]).sum(), qkv)
    return out, gradient


def test_sdpa_per_group_equals_the_block_diagonal_mask() -> None:
    qkv = torch.randn(ROWS, 3 * 2 * 4, dtype=torch.float64)
    for got, expected in zip(_with_gradient("sdpa", qkv, 2, CPU), _with_gradient("dense", qkv, 2, CPU), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_sequence_does_not_see_another() -> None:
    qkv = torch.randn(ROWS, 3 * 2 * 4)
    changed = qkv.clone()
    changed[5:10] += 1.0  # the second sequence
    before, after = (KERNELS["sdpa"](x, 2, make_layout("sdpa", GROUPS, CPU)) for x in (qkv, changed))
    same = (before == after).all(1)
    assert same.tolist() == [not 5 <= row < 10 for row in range(ROWS)]


def test_boundaries_are_the_first_rows_and_the_end() -> None:
    boundaries = make_layout("varlen", GROUPS, CPU).boundaries
    assert boundaries is not None
    assert boundaries.tolist() == [0, 5, 10, 12, 14, 16, 23]
    assert boundaries.dtype == torch.int32


@pytest.mark.parametrize(
    ("works", "chosen"), [({"varlen", "xformers"}, "varlen"), ({"xformers"}, "xformers"), (set(), "sdpa")]
)
def test_auto_takes_the_first_that_works_on_cuda(monkeypatch: pytest.MonkeyPatch, works: set[str], chosen: str) -> None:
    monkeypatch.setattr(attention_kernels, "_why_not", lambda kernel, *_: "" if kernel in works else "not here")
    assert choose_kernel("auto", CUDA, torch.bfloat16, 64) == chosen
    assert choose_kernel("auto", CPU, torch.bfloat16, 64) == "sdpa"
    assert choose_kernel("sdpa", CUDA, torch.bfloat16, 64) == "sdpa"


@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_what_does_not_work_here_is_refused(kernel: str) -> None:
    with pytest.raises(
        ValueError, match=rf"MODEL.ATTENTION {kernel} does not work on cpu in float32 .* width 64 \(.+\)"
    ):
        choose_kernel(kernel, CPU, torch.float32, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_kernels_equal_the_block_diagonal_mask(kernel: str, dtype: torch.dtype) -> None:
    try:
        choose_kernel(kernel, CUDA, dtype, 64)
    except ValueError as error:
        pytest.skip(str(error))
    qkv = torch.randn(ROWS, 3 * 2 * 64, device=CUDA, dtype=dtype)
    expected = _with_gradient("dense", qkv.float(), 2, CUDA)
    for got, plain in zip(_with_gradient(kernel, qkv, 2, CUDA), expected, strict=True):
        torch.testing.assert_close(got.float(), plain, rtol=3e-2, atol=3e-2 * plain.abs().max().item())
