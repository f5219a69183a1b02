"""The cross-view loss on CLS tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dinoengine.modeling.losses.precision import at_least_fp32


def dino_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    student_temp: float,
    *,
    skip_same_view: bool,
    rows: list[Tensor] | None = None,
) -> Tensor:
    """Cross-view distillation (DINO, arXiv:2104.14294, Eq. 3), summed over the pairs of views.

    loss = 0
    for s in student views, t in teacher views, unless skip_same_view and s == t:
        loss += mean over b of  -sum_k teacher_probs[t, b, k] * log_softmax(student_logits[s, b] / student_temp)[k]

    Args:
        student_logits: [S, B, K], any float dtype; computed in fp32 at least.
        teacher_probs: [T, B, K], each row sums to 1; no gradient.
        student_temp: > 0.
        skip_same_view: leave out pairs of the same view (global crops); needs S == T.
        rows: gets what each crop adds, [S, B] without gradient: the loss is the sum over S of the means over B.

    Returns:
        Scalar. 0 when no pair is left.

    Raises:
        ValueError: if B or K differ, or S != T with ``skip_same_view``; gives both shapes.
    """
    if student_logits.shape[1:] != teacher_probs.shape[1:] or (
        skip_same_view and student_logits.shape != teacher_probs.shape
    ):
        raise ValueError(
            f"Student logits {list(student_logits.shape)} and teacher probabilities {list(teacher_probs.shape)} do not "
            f"match as [views, batch, prototypes] (skip_same_view={skip_same_view})."
        )
    log_probs = F.log_softmax(at_least_fp32(student_logits) / student_temp, dim=-1)
    # Cross entropy is linear in the target, so the targets of all pairs of a student view are added up first.
    targets = teacher_probs.sum(0, keepdim=True)  # [1, B, K]
    if skip_same_view:
        targets = targets - teacher_probs  # [S, B, K]
    cross_entropy = -(targets * log_probs).sum(-1)  # [S, B]
    if rows is not None:
        rows.append(cross_entropy.detach())
    return cross_entropy.mean(1).sum()
