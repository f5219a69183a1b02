"""A student trained by gradient and a teacher that is its moving average."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch.feature_model import FeatureModel, PrototypeHead
from dinoengine.structures import ParamFacts


class StudentTeacher(nn.Module):
    """Two copies of the same named parts (backbone, dino_head, ...); only the student's are trained.

    The teacher starts as a copy of the student, stays in eval mode, and has no gradient.
    """

    def __init__(self, student: dict[str, nn.Module], teacher: dict[str, nn.Module], pixel_norm: PixelNorm) -> None:
        """
        Args:
            student: parts by name, "backbone" among them.
            teacher: the same parts; their values are overwritten by the student's.
        """
        super().__init__()
        assert student.keys() == teacher.keys(), (list(student), list(teacher))
        self.pixel_norm = pixel_norm
        self.student = nn.ModuleDict(student)
        self.teacher = nn.ModuleDict(teacher)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher.eval()

    def train(self, mode: bool = True) -> StudentTeacher:
        """As ``nn.Module.train``, but the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student for every parameter; buffers are copied."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)
        for mine, his in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            mine.copy_(his)

    def param_facts(self, name: str) -> ParamFacts:
        """Facts about a parameter of the student, asked from the part that owns it."""
        side, part, rest = name.split(".", 2)
        assert side == "student", f"{name} is not a trainable parameter"
        facts: ParamFacts = self.student[part].param_facts(rest)  # type: ignore[operator]
        return replace(facts, in_backbone=part == "backbone")

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Each part of the student is clipped on its own, as published."""
        return {name: [p for p in part.parameters() if p.requires_grad] for name, part in self.student.items()}

    def feature_model(self, which: str = "teacher") -> FeatureModel:
        """The teacher's backbone (or the student's), sharing its parameters; the teacher's with its prototypes."""
        backbone = getattr(self, which)["backbone"]
        return FeatureModel(self.pixel_norm, backbone, self.prototype_head() if which == "teacher" else None)

    def prototype_head(self) -> PrototypeHead | None:
        """How the teacher assigns CLS tokens to prototypes; None for a method without. Override."""
        return None
