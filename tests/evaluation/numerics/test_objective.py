"""Each check of the objective fails where a term, a target or the teacher is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.config import defaults
from dinoengine.evaluation.numerics import objective
from dinoengine.modeling.losses import Centering, SinkhornKnopp, koleo
from dinoengine.modeling.meta_arch import StudentTeacher, dinov2
from tests.evaluation.numerics.failures import failures

GLOBAL, LOCAL = "weight of a pair of global views", "weight of a local and a global view"
MASKED = "weight of the mean masked crop, half of the crops masked"
SPREAD = "weight of KoLeo's mean over both global views"


def _same_view(student: Tensor, teacher: Tensor, temp: float, *, skip_same_view: bool, **options: Any) -> Tensor:
    teacher = teacher.flip(0) if skip_same_view else teacher
    return dino_loss(student, teacher, temp, skip_same_view=skip_same_view, **options)


dino_loss, ibot_loss, koleo_loss = dinov2.dino_loss, dinov2.ibot_loss, dinov2.koleo_loss


@pytest.mark.parametrize(
    ("name", "replacement", "failed"),
    [
        ("dino_loss", _same_view, [GLOBAL]),
        ("dino_loss", lambda *a, **o: dino_loss(*a, **o) / len(a[0]), [GLOBAL, LOCAL]),
        ("ibot_loss", lambda s, t, w, crops, temp, **o: ibot_loss(s, t, w, crops // 2, temp, **o), [MASKED]),
        ("mask_weights", lambda masks, masked: torch.full((int(masks.sum()),), 3 / int(masks.sum())), [MASKED]),
        ("koleo_loss", lambda cls, group, **o: koleo_loss(cls, group, **o) / 2, [SPREAD]),
    ],
    ids=["same view", "mean over views", "masked crops only", "mean over patches", "shown, not optimised"],
)
def test_a_wrong_weight_fails(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any, failed: list[str]) -> None:
    monkeypatch.setattr(dinov2, name, replacement)
    assert failures(objective.check_loss_weights) == failed


def test_a_wrong_student_temperature_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defaults._C.MODEL.LOSS, "STUDENT_TEMP", 0.2)
    assert failures(objective.check_loss_weights) == [GLOBAL, LOCAL, MASKED]


def test_patches_that_another_crop_predicts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "ibot_loss", lambda s, t, *rest, **o: ibot_loss(s, t.roll(1, 0), *rest, **o))
    assert failures(objective.check_loss_weights) == [MASKED]


def test_another_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prototypes that are not of length 1 widen the logits, and the first loss."""
    original = objective.DINOHead

    def longer(*args: Any, **options: Any) -> Any:
        head = original(*args, **options)
        torch.nn.init.constant_(head.last_layer.weight_g, 1.2)
        return head

    monkeypatch.setattr(objective, "DINOHead", longer)
    assert len(failures(objective.check_first_losses)) == 2


def test_wrong_targets_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "SinkhornKnopp", lambda rounds: SinkhornKnopp(rounds - 1))
    assert failures(objective.check_targets) == ["Sinkhorn-Knopp, 3 rounds, difference"]

    class EarlyCentre(Centering):
        def forward(self, logits: Tensor, temp: float) -> Tensor:
            self.update(logits)
            return super().forward(logits, temp)

    monkeypatch.setattr(objective, "Centering", EarlyCentre)
    assert failures(objective.check_targets)[-1] == "centring over 4 batches, difference"


def test_targets_that_are_nan_in_a_later_batch_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenUpdate(Centering):
        def update(self, logits: Tensor) -> None:
            self.center.fill_(math.nan)

    monkeypatch.setattr(objective, "Centering", BrokenUpdate)
    assert failures(objective.check_targets) == ["centring over 4 batches, difference"]


def test_wrong_losses_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(koleo, "EPS", 0.1)
    monkeypatch.setattr(objective, "mask_weights", lambda masks: torch.ones(int(masks.sum())))
    assert failures(objective.check_koleo_and_ibot) == ["KoLeo, difference", "iBOT, difference"]


def test_a_teacher_that_follows_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StudentTeacher.update_teacher
    monkeypatch.setattr(StudentTeacher, "update_teacher", lambda self, momentum: original(self, momentum - 1e-4))
    assert failures(objective.check_teacher) == ["EMA teacher over 10 steps, difference"]


def test_a_teacher_with_nan_in_its_last_parameter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StudentTeacher.update_teacher

    def update(self: StudentTeacher, momentum: float) -> None:
        original(self, momentum)
        with torch.no_grad():
            list(self.teacher.parameters())[-1].fill_(math.nan)

    monkeypatch.setattr(StudentTeacher, "update_teacher", update)
    assert failures(objective.check_teacher) == ["EMA teacher over 10 steps, difference"]
