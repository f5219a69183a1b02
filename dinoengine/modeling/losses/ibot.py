"""The masked-patch loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoengine.modeling.losses.precision import at_least_fp32


def mask_weights(masks: Tensor, masked: Tensor | None = None) -> Tensor:
    """1 / (masked patches in its crop) for every masked patch.

    Args:
        masks: [crops, N] bool.
        masked: [M] int64, the indices of the masked patches in the flat ``masks``. None: they are looked up, for which
            the host waits for the device.

    Returns:
        [M] fp32.
    """
    if masked is None:
        masked = masks.flatten().nonzero().squeeze(1)
    weights = 1.0 / masks.sum(1).clamp(min=1).float()
    return weights.index_select(0, masked // masks.shape[1])


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    weights: Tensor,
    num_crops: int,
    student_temp: float,
    *,
    rows: list[Tensor] | None = None,
) -> Tensor:
    """Masked-patch distillation (iBOT, arXiv:2111.07832, Eq. 2, normalised as DINOv2 does).

    loss = sum over masked patches m of
        weights[m] * -sum_k teacher_probs[m, k] * log_softmax(student_logits[m] / student_temp)[k]   / num_crops

    With ``weights`` of ``mask_weights`` every masked crop counts the same; ``num_crops`` counts all global crops,
    masked or not, so with half of them masked the mean over masked crops enters with factor 1/2.

    Args:
        student_logits: [M, K], any float dtype; computed in fp32 at least. M may be 0.
        teacher_probs: [M, K], rows sum to 1, of the same patches seen by the teacher without mask; no gradient.
        weights: [M].
        num_crops: global crops of the batch, G * B.
        rows: gets what each masked patch adds, [M] without gradient: the loss is their sum over ``num_crops``.

    Returns:
        Scalar; 0 (with a gradient of 0) when nothing is masked.

    Raises:
        ValueError: if the shapes do not match.
    """
    if student_logits.shape != teacher_probs.shape or weights.shape != student_logits.shape[:1]:
        raise ValueError(
            f"Student logits {list(student_logits.shape)}, teacher probabilities {list(teacher_probs.shape)} and weights "
            f"{list(weights.shape)} must be [M, K], [M, K] and [M]."
        )
    log_probs = F.log_softmax(at_least_fp32(student_logits) / student_temp, dim=-1)
    cross_entropy = -torch.sum(teacher_probs * log_probs, dim=-1)  # [M]
    weighted = cross_entropy * weights
    if rows is not None:
        rows.append(weighted.detach())
    return weighted.sum() / num_crops
