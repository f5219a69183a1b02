"""DINOv2 (arXiv:2304.07193): DINO on CLS tokens, iBOT on masked patches, KoLeo.

One step, in order:

    teacher, no gradient, on the unmasked global crops:   CLS logits [G, B, K], logits of the masked patches [M, K]
    targets over the batch of all ranks:                  centring or Sinkhorn-Knopp; then the centres are updated
    student on masked global crops and local crops:       CLS logits, logits of the masked patches
    losses:
        dino_global   each global crop against the teacher's *other* view
        dino_local    each local crop against both teacher views
        ibot          each masked patch against the teacher's same patch
        koleo         on the student's global CLS tokens, each view apart, before the head

Every (student crop, teacher view) pair of the DINO terms weighs 1 / (G(G-1) + G L) = 1 / (2 + 2 L).
The student's global CLS tokens come from the crops as masked, so DINO and KoLeo see masked crops too (as published).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.config import CfgNode, configurable
from dinoengine.modeling.backbone import build_backbone
from dinoengine.modeling.build import META_ARCH_REGISTRY
from dinoengine.modeling.heads import build_head
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.losses import Centering, build_targets, dino_loss, ibot_loss, koleo_loss, mask_weights
from dinoengine.modeling.losses.precision import at_least_fp32
from dinoengine.modeling.meta_arch.feature_model import PrototypeHead
from dinoengine.modeling.meta_arch.student_teacher import StudentTeacher
from dinoengine.structures import LossTerm, LossTerms, SSLBatch


@dataclass
class TeacherTargets:
    """What the student is to predict.

    Attributes:
        cls: [G, B, K] probabilities, or None without the DINO loss.
        patches: [M, K] probabilities of the masked patches, or None without the iBOT loss.
    """

    cls: Tensor | None
    patches: Tensor | None


@META_ARCH_REGISTRY.register()
class DINOv2(StudentTeacher):
    """The published method; each loss can be switched off by its weight.

    Attributes:
        teacher_temp: temperature of the teacher's targets; a hook sets it before each step.
    """

    @configurable
    def __init__(
        self,
        *,
        student: dict[str, nn.Module],
        teacher: dict[str, nn.Module],
        pixel_norm: PixelNorm,
        dino_targets: nn.Module | None,
        ibot_targets: nn.Module | None,
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_group_size: int = 0,
        student_temp: float = 0.1,
        teacher_temp: float = 0.07,
    ) -> None:
        """
        Args:
            student, teacher: parts "backbone", "dino_head" (unless only patches with a head of their own are used) and
                "ibot_head" (if patches have their own).
            dino_targets, ibot_targets: ``Centering`` or ``SinkhornKnopp``; None where the loss is off.
            dino_weight, ibot_weight, koleo_weight: 0 switches a term off.
            koleo_group_size: images compared by KoLeo; 0: the global batch.
        """
        super().__init__(student, teacher, pixel_norm)
        self.dino_targets = dino_targets
        self.ibot_targets = ibot_targets
        self.dino_weight = dino_weight
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.koleo_group_size = koleo_group_size
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.patch_head = "ibot_head" if "ibot_head" in student else "dino_head"
        if not ibot_weight:
            self.student["backbone"].disable_masking()  # type: ignore[operator]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        loss = cfg.MODEL.LOSS
        use_dino, use_ibot = loss.DINO_WEIGHT > 0, loss.IBOT_WEIGHT > 0
        separate = use_ibot and cfg.MODEL.IBOT_HEAD.SEPARATE

        def parts(for_teacher: bool) -> dict[str, nn.Module]:
            backbone = build_backbone(cfg, for_teacher=for_teacher)
            built: dict[str, nn.Module] = {"backbone": backbone}
            if use_dino or (use_ibot and not separate):
                built["dino_head"] = build_head(cfg.MODEL.DINO_HEAD, cfg.MODEL.DINO_HEAD.NAME, backbone.embed_dim)
            if separate:
                built["ibot_head"] = build_head(cfg.MODEL.IBOT_HEAD, cfg.MODEL.DINO_HEAD.NAME, backbone.embed_dim)
            return built

        def targets(head_cfg: CfgNode) -> nn.Module:
            return build_targets(
                loss.CENTERING,
                head_cfg.NUM_PROTOTYPES,
                center_momentum=loss.CENTER_MOMENTUM,
                sinkhorn_iters=loss.SINKHORN_ITERS,
            )

        return {
            "student": parts(for_teacher=False),
            "teacher": parts(for_teacher=True),
            "pixel_norm": PixelNorm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD),
            "dino_targets": targets(cfg.MODEL.DINO_HEAD) if use_dino else None,
            "ibot_targets": targets(cfg.MODEL.IBOT_HEAD if separate else cfg.MODEL.DINO_HEAD) if use_ibot else None,
            "dino_weight": loss.DINO_WEIGHT,
            "ibot_weight": loss.IBOT_WEIGHT,
            "koleo_weight": loss.KOLEO_WEIGHT,
            "koleo_group_size": loss.KOLEO_GROUP_SIZE,
            "student_temp": loss.STUDENT_TEMP,
            "teacher_temp": cfg.MODEL.TEACHER.TEMP,
        }

    def forward(self, batch: SSLBatch) -> LossTerms:
        """The terms of the objective for one batch (or one micro-batch with targets attached).

        Raises:
            ValueError: if the iBOT loss is on and the batch has no masks.
        """
        if self.ibot_weight and batch.masks is None:
            raise ValueError("MODEL.LOSS.IBOT_WEIGHT > 0 needs masks in the batch; see MaskPlan and INPUT.MASK.")
        targets = batch.targets if batch.targets is not None else self.compute_targets([batch])[0]
        return self._losses(batch, targets)

    def split_batch(self, batch: SSLBatch, num_parts: int) -> list[SSLBatch]:
        """Micro-batches whose mean loss is the loss of ``batch``: their targets come from the whole batch.

        KoLeo compares images of one micro-batch, so its group size must fit into one.
        """
        parts = batch.split(num_parts)
        for part, targets in zip(parts, self.compute_targets(parts), strict=True):
            part.targets = targets
        return parts

    @torch.no_grad()
    def compute_targets(self, parts: list[SSLBatch]) -> list[TeacherTargets]:
        """Targets of all parts of a batch together, then (in training) one update of the centres."""
        logits = [self._teacher_logits(part) for part in parts]
        cls_targets: list[Tensor | None] = [None] * len(parts)
        patch_targets: list[Tensor | None] = [None] * len(parts)
        if self.dino_targets is not None:
            rows = [part_logits.flatten(0, 1) for part_logits, _ in logits if part_logits is not None]
            probs = self._targets(self.dino_targets, rows)
            cls_targets = [p.unflatten(0, (part.num_global_views, -1)) for p, part in zip(probs, parts, strict=True)]
        if self.ibot_targets is not None:
            patch_targets = [
                *self._targets(self.ibot_targets, [patches for _, patches in logits if patches is not None])
            ]
        return [TeacherTargets(c, p) for c, p in zip(cls_targets, patch_targets, strict=True)]

    def _targets(self, make_targets: nn.Module, rows: list[Tensor]) -> tuple[Tensor, ...]:
        all_rows = torch.cat(rows) if len(rows) > 1 else rows[0]  # cat of one would copy it
        probs = make_targets(all_rows, self.teacher_temp)
        if self.training:
            make_targets.update(all_rows)  # type: ignore[operator]
        return probs.split([len(r) for r in rows])

    def _teacher_logits(self, batch: SSLBatch) -> tuple[Tensor | None, Tensor | None]:
        """([G, B, K] or None, [M, K] or None)."""
        masked = batch.masked_patches() if self.ibot_weight else None
        pick_tokens = self.teacher["backbone"].pick_tokens
        (tokens,) = pick_tokens([self.pixel_norm(batch.global_crops)], [None], [masked])  # type: ignore[operator]
        cls_logits = patch_logits = None
        if self.dino_weight:
            cls_logits = self.teacher["dino_head"](tokens.cls_token).unflatten(0, (batch.num_global_views, -1))
        if self.ibot_weight:
            patch_logits = self.teacher[self.patch_head](tokens.patches)
        return cls_logits, patch_logits

    def _losses(self, batch: SSLBatch, targets: TeacherTargets) -> LossTerms:
        # Only the DINO loss looks at local crops.
        use_locals = bool(self.dino_weight) and batch.num_local_views > 0
        crops = [batch.global_crops] + ([batch.local_crops] if use_locals else [])
        masks = [batch.masks if self.ibot_weight else None] + [None] * use_locals
        masked = batch.masked_patches() if self.ibot_weight else None  # [M]
        pick_tokens = self.student["backbone"].pick_tokens
        tokens = pick_tokens([self.pixel_norm(c) for c in crops], masks, [masked] + [None] * use_locals)  # type: ignore[operator]
        global_cls = tokens[0].cls_token  # [G*B, D]
        local_cls = tokens[1].cls_token if use_locals else global_cls[:0]  # [L*B, D]
        global_logits, local_logits, patch_logits = self._student_logits(global_cls, local_cls, tokens[0].patches)

        terms: list[LossTerm] = []
        rows: dict[str, list[Tensor]] = {"dino": [], "ibot": [], "koleo": []}  # what crops, patches and images add
        metrics = _spread_of_features(global_cls.detach()) if len(batch) > 1 else {}
        views = batch.num_global_views
        if targets.cls is not None:
            num_pairs = views * (views - 1) + views * batch.num_local_views
            by_view = global_logits.unflatten(0, (views, -1))
            across = dino_loss(by_view, targets.cls, self.student_temp, skip_same_view=True, rows=rows["dino"])
            terms.append(LossTerm("dino_global", across / num_pairs, self.dino_weight))
            if use_locals:
                by_view = local_logits.unflatten(0, (batch.num_local_views, -1))
                to_locals = dino_loss(by_view, targets.cls, self.student_temp, skip_same_view=False, rows=rows["dino"])
                terms.append(LossTerm("dino_local", to_locals / num_pairs, self.dino_weight))
            metrics["teacher_entropy"] = torch.special.entr(targets.cls).sum(-1).mean()
            mean_target = targets.cls.flatten(0, 1).mean(0)  # [K]
            metrics["prototype_perplexity"] = torch.special.entr(mean_target).sum().exp()
        if targets.patches is not None:
            assert batch.masks is not None
            assert masked is not None
            weights = mask_weights(batch.masks, masked)
            value = ibot_loss(
                patch_logits, targets.patches, weights, len(batch.masks), self.student_temp, rows=rows["ibot"]
            )
            terms.append(LossTerm("ibot", value, self.ibot_weight))
        if self.koleo_weight:
            per_view = [koleo_loss(cls, self.koleo_group_size, rows=rows["koleo"]) for cls in global_cls.chunk(views)]
            terms.append(LossTerm("koleo", torch.stack(per_view).sum(), self.koleo_weight))
        return LossTerms(terms, metrics, self._per_image(batch, rows) if batch.sources is not None else None)

    @torch.no_grad()
    def _per_image(self, batch: SSLBatch, rows: dict[str, list[Tensor]]) -> Tensor:
        """[B]: the parts of the objective by image, so that their mean is its value."""
        views, num_images = batch.num_global_views, len(batch)
        num_pairs = views * (views - 1) + views * batch.num_local_views
        total = torch.zeros(num_images, device=batch.global_crops.device)
        for by_crop in rows["dino"]:  # [views, B]
            total += by_crop.sum(0).float() * (self.dino_weight / num_pairs)
        for by_patch in rows["ibot"]:  # [M]
            assert batch.masks is not None
            crops = torch.arange(len(batch.masks), device=total.device)
            # With the size given nothing waits for the device.
            crop_of = crops.repeat_interleave(batch.masks.sum(1), output_size=len(by_patch))
            total.index_add_(0, crop_of % num_images, by_patch.float() * (self.ibot_weight / views))
        for by_image in rows["koleo"]:  # [B]
            total += by_image.float() * self.koleo_weight
        return total

    def prototype_head(self) -> PrototypeHead | None:
        """Softmax of the teacher's logits at its temperature, centred if the targets are; None without the DINO loss.

        Sinkhorn-Knopp normalises over a batch and has no say about one image; what is left is the softmax it starts from.
        """
        if self.dino_targets is None:
            return None

        def probabilities(cls_tokens: Tensor) -> Tensor:
            logits = at_least_fp32(self.teacher["dino_head"](cls_tokens))
            center = self.dino_targets.center if isinstance(self.dino_targets, Centering) else 0.0
            return F.softmax((logits - center) / self.teacher_temp, dim=-1)

        return PrototypeHead(probabilities, lambda: self.teacher_temp)

    def _student_logits(self, global_cls: Tensor, local_cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the three kinds of tokens; one head call where they share a head. Empty where a loss is off."""
        sizes = [len(global_cls), len(local_cls)]
        cls_tokens = torch.cat((global_cls, local_cls))
        if not self.dino_weight:
            nothing = patches[:0]
            return nothing, nothing, self.student[self.patch_head](patches) if self.ibot_weight else nothing
        if self.patch_head == "dino_head" and self.ibot_weight:
            logits = self.student["dino_head"](torch.cat((cls_tokens, patches)))
            return tuple(logits.split([*sizes, len(patches)]))
        global_logits, local_logits = self.student["dino_head"](cls_tokens).split(sizes)
        patch_logits = self.student[self.patch_head](patches) if self.ibot_weight else patches[:0]
        return global_logits, local_logits, patch_logits


def _spread_of_features(cls_tokens: Tensor) -> dict[str, Tensor]:
    """[G*B, D] -> standard deviation of the L2-normalised rows, mean over D, in units of 1 / sqrt(D).

    0: all images have the same features; 1: they are spread over the whole sphere.
    """
    rows = F.normalize(at_least_fp32(cls_tokens), dim=-1)
    return {"feature_std_relative": rows.std(0, correction=0).mean() * rows.shape[-1] ** 0.5}
