"""The masked-patch loss against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.losses import ibot_loss, mask_weights

MASKS = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])


def _inputs(rows: int = 4, prototypes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, prototypes, generator=generator, dtype=torch.float64)
    return student, torch.randn(rows, prototypes, generator=generator, dtype=torch.float64).softmax(-1)


def test_weights_make_every_masked_crop_count_the_same() -> None:
    weights = mask_weights(MASKS)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert mask_weights(torch.zeros(2, 4, dtype=torch.bool)).shape == (0,)
    torch.testing.assert_close(mask_weights(torch.ones(2, 4, dtype=torch.bool)), torch.full((8,), 0.25))


def test_equals_the_slow_loop_over_crops() -> None:
    student, teacher = _inputs()
    row, total = 0, 0.0
    for crop in MASKS.tolist():
        in_crop = []
        for masked in crop:
            if masked:
                norm = math.log(sum(math.exp(z / 0.2) for z in student[row]))
                pairs = zip(teacher[row], student[row], strict=True)
                in_crop.append(-sum(float(p) * (float(z) / 0.2 - norm) for p, z in pairs))
                row += 1
        total += sum(in_crop) / len(in_crop) if in_crop else 0.0
    got = ibot_loss(student, teacher, mask_weights(MASKS).double(), 3, 0.2)
    assert got.item() == pytest.approx(total / 3)


def test_half_of_the_crops_masked_gives_half_of_their_mean() -> None:
    # Uniform student: every cross entropy is log K. Two of four crops are masked, whatever their counts.
    masks = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    got = ibot_loss(torch.zeros(3, 8), torch.full((3, 8), 1 / 8), mask_weights(masks), 4, 0.1)
    assert got.item() == pytest.approx(math.log(8) / 2)


def test_the_gradient_is_right() -> None:
    student, teacher = _inputs()
    student.requires_grad_()
    weights = mask_weights(MASKS).double()
    assert torch.autograd.gradcheck(lambda s: ibot_loss(s, teacher, weights, 3, 0.2), (student,))


def test_nothing_masked_is_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 5), torch.zeros(0), 4, 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None


def test_half_precision_is_computed_in_fp32() -> None:
    student, teacher = _inputs()
    weights = mask_weights(MASKS)
    got = ibot_loss(student.bfloat16(), teacher.float(), weights, 3, 0.1)
    torch.testing.assert_close(got, ibot_loss(student.bfloat16().float(), teacher.float(), weights, 3, 0.1))
    assert got.dtype == torch.float32


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[4, 5\], teacher probabilities \[4, 6\] and weights \[4\] must be"):
        ibot_loss(torch.zeros(4, 5), torch.zeros(4, 6), torch.zeros(4), 2, 0.1)
