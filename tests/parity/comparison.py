"""What the comparisons with other libraries share: random weights, images, and the allowed difference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinoengine.evaluation.numerics.quantity import largest
from dinoengine.modeling.backbone import VisionTransformer
from dinoengine.structures import BackboneOutput

TOLERANCE = 1e-4  # of fp32 tokens of size about 1


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every parameter values of its own: no zero, one or 1e-5 of an initialisation may hide a wrong mapping."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)


def random_images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def load_except_mask_token(ours: VisionTransformer, state: dict[str, Tensor]) -> None:
    """Every key of ``state`` is used and only the mask token, which some libraries do not have, may be missing."""
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert set(missing) <= {"mask_token"}
    assert unexpected == []


def largest_difference(got: BackboneOutput, cls_token: Tensor, register_tokens: Tensor, patch_tokens: Tensor) -> float:
    """Over all tokens; the shapes must agree."""
    pairs = [
        (got.cls_token, cls_token),
        (got.register_tokens, register_tokens),
        (got.patch_tokens, patch_tokens),
    ]
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
    return largest((mine - theirs).abs().max().item() for mine, theirs in pairs if mine.numel())
