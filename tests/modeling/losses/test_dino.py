"""The cross-view loss against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dinoengine.modeling.losses import dino_loss


def _inputs(student_views: int, teacher_views: int, batch: int = 3, prototypes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(student_views, batch, prototypes, generator=generator, dtype=torch.float64)
    teacher = torch.randn(teacher_views, batch, prototypes, generator=generator, dtype=torch.float64).softmax(-1)
    return student, teacher


def _slow(student: Tensor, teacher: Tensor, temp: float, skip_same_view: bool) -> float:
    total = 0.0
    for s in range(len(student)):
        for t in range(len(teacher)):
            if skip_same_view and s == t:
                continue
            for b in range(student.shape[1]):
                norm = math.log(sum(math.exp(z / temp) for z in student[s, b]))
                cross = -sum(p * (z / temp - norm) for p, z in zip(teacher[t, b], student[s, b], strict=True))
                total += float(cross) / student.shape[1]
    return total


@pytest.mark.parametrize(
    ("student_views", "teacher_views", "skip"),
    [(2, 2, True), (5, 2, False), (1, 1, False), (3, 3, True), (1, 2, False)],
)
def test_equals_the_slow_loop(student_views: int, teacher_views: int, skip: bool) -> None:
    student, teacher = _inputs(student_views, teacher_views)
    got = dino_loss(student, teacher, 0.3, skip_same_view=skip)
    assert got.item() == pytest.approx(_slow(student, teacher, 0.3, skip))


def test_by_hand() -> None:
    # Uniform student over two prototypes: every cross entropy is log 2, and two views have two pairs.
    teacher = torch.tensor([[[1.0, 0.0]], [[0.25, 0.75]]])
    assert dino_loss(torch.zeros(2, 1, 2), teacher, 0.1, skip_same_view=True).item() == pytest.approx(2 * math.log(2))


def test_the_gradient_is_right() -> None:
    student, teacher = _inputs(2, 2)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, 0.3, skip_same_view=True), (student,))


def test_a_global_view_is_never_compared_with_itself() -> None:
    student, teacher = _inputs(2, 2)
    student.requires_grad_()
    dino_loss(student, teacher, 0.3, skip_same_view=True).backward()
    # For one pair the gradient is (softmax(student) - teacher of the *other* view) / temp / B.
    expected = ((student / 0.3).softmax(-1) - teacher.flip(0)) / 0.3 / 3
    torch.testing.assert_close(student.grad, expected.detach())


def test_permuting_the_batch_changes_nothing() -> None:
    student, teacher = _inputs(2, 2)
    order = torch.tensor([2, 0, 1])
    first = dino_loss(student, teacher, 0.3, skip_same_view=True)
    torch.testing.assert_close(dino_loss(student[:, order], teacher[:, order], 0.3, skip_same_view=True), first)


def test_edges() -> None:
    one_view = dino_loss(*_inputs(1, 1), 0.3, skip_same_view=True)
    assert one_view.item() == 0.0  # no pair is left
    assert dino_loss(torch.randn(2, 3, 1), torch.ones(2, 3, 1), 0.3, skip_same_view=True).item() == 0.0  # K = 1


def test_half_precision_is_computed_in_fp32() -> None:
    student, teacher = _inputs(2, 2)
    got = dino_loss(student.bfloat16(), teacher.float(), 0.1, skip_same_view=True)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, dino_loss(student.bfloat16().float(), teacher.float(), 0.1, skip_same_view=True))


@pytest.mark.parametrize(("shape", "skip"), [((2, 4, 4), False), ((2, 3, 5), False), ((3, 3, 4), True)])
def test_shapes_that_do_not_match_are_named(shape: tuple[int, ...], skip: bool) -> None:
    _, teacher = _inputs(2, 2)
    with pytest.raises(ValueError, match=rf"Student logits \[{shape[0]}, {shape[1]}, {shape[2]}\] and teacher"):
        dino_loss(torch.zeros(shape), teacher, 0.3, skip_same_view=skip)
