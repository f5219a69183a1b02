"""The method as a whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.modeling import DINOv2, build_model
from dinoengine.modeling.losses import mask_weights
from dinoengine.structures import LossTerms, SSLBatch

B, LOCAL = 4, 3


def _batch(seed: int = 0, local_views: int = LOCAL, mask_share: float = 0.5) -> SSLBatch:
    g = torch.Generator().manual_seed(seed)
    local = torch.randint(0, 256, (local_views * B, 3, 4, 4), generator=g, dtype=torch.uint8) if local_views else None
    return SSLBatch(
        global_crops=torch.randint(0, 256, (2 * B, 3, 8, 8), generator=g, dtype=torch.uint8),
        local_crops=local,
        masks=torch.rand(2 * B, 4, generator=g) < mask_share,
        positions=torch.arange(B),
        num_local_views=local_views,
    )


def _model(cfg: CfgNode, *opts: Any) -> DINOv2:
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.IBOT_HEAD.NUM_PROTOTYPES", 16, *opts])
    torch.manual_seed(3)
    model = build_model(cfg)
    with torch.no_grad():  # features that differ from image to image, as after some training
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.teacher_temp = 0.05
    return model


def _values(losses: LossTerms) -> dict[str, float]:
    return {term.name: term.value.item() for term in losses.terms}


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("separate", [False, True])
def test_every_term_equals_its_definition_written_out(tiny_cfg: CfgNode, separate: bool) -> None:
    model = _model(tiny_cfg, "MODEL.IBOT_HEAD.SEPARATE", separate)
    batch = _batch()
    got = _values(model(batch))

    student, teacher = model.student, model.teacher
    patch_head = "ibot_head" if separate else "dino_head"
    with torch.no_grad():
        seen = teacher["backbone"](model.pixel_norm(batch.global_crops))
        hidden = student["backbone"](model.pixel_norm(batch.global_crops), batch.masks)
        local = student["backbone"](model.pixel_norm(batch.local_crops))
        targets = (teacher["dino_head"](seen.cls_token) / 0.05).softmax(-1)  # the centre starts at 0
        view_1, view_2 = targets.chunk(2)
        global_1, global_2 = student["dino_head"](hidden.cls_token).chunk(2)
        terms = 2 + 2 * LOCAL
        # Each global view against the teacher's other view, each local view against both.
        dino_global = (_cross_entropy(global_1, view_2).mean() + _cross_entropy(global_2, view_1).mean()) / terms
        pairs = [
            _cross_entropy(c, t).mean()
            for c in student["dino_head"](local.cls_token).chunk(LOCAL)
            for t in (view_1, view_2)
        ]
        dino_local = sum(pairs) / terms
        patch_targets = (teacher[patch_head](seen.patch_tokens[batch.masks]) / 0.05).softmax(-1)
        patch_loss = _cross_entropy(student[patch_head](hidden.patch_tokens[batch.masks]), patch_targets)
        ibot = (patch_loss * mask_weights(batch.masks)).sum() / (2 * B)
        koleo = 0.0
        for cls in hidden.cls_token.chunk(2):
            points = cls / cls.norm(dim=1, keepdim=True)
            distances = torch.cdist(points, points) + 10 * torch.eye(B)
            koleo -= distances.min(1).values.log().mean().item()
    assert got == pytest.approx(
        {"dino_global": dino_global.item(), "dino_local": dino_local.item(), "ibot": ibot.item(), "koleo": koleo},
        rel=1e-4,
    )


def test_with_8_local_views_the_shares_are_2_and_16_of_18(tiny_cfg: CfgNode) -> None:
    # Uniform predictions: every cross entropy is log K, whatever the target.
    model = _model(tiny_cfg)
    with torch.no_grad():
        for side in (model.student, model.teacher):
            side["dino_head"].last_layer.weight_g.zero_()
    got = _values(model(_batch(local_views=8)))
    assert got["dino_global"] == pytest.approx(2 / 18 * math.log(16), rel=1e-5)
    assert got["dino_local"] == pytest.approx(16 / 18 * math.log(16), rel=1e-5)


def test_only_the_student_gets_gradients_and_the_total_is_what_is_logged(tiny_cfg: CfgNode) -> None:
    model = _model(tiny_cfg)
    losses = model(_batch())
    losses.total().backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert {t.name: t.weight for t in losses.terms} == {
        "dino_global": 1.0,
        "dino_local": 1.0,
        "ibot": 1.0,
        "koleo": 0.1,
    }
    total = sum(value.item() for _, value in losses.contributions())
    assert losses.total().item() == pytest.approx(total, rel=1e-6)
    assert not losses.metrics["teacher_entropy"].requires_grad
    assert 0 < losses.metrics["teacher_entropy"].item() < math.log(16)


def test_metrics_of_collapse_by_hand(tiny_cfg: CfgNode) -> None:
    model = _model(tiny_cfg)
    batch = _batch()
    targets = model.compute_targets([batch])[0]
    assert targets.cls is not None
    mean = targets.cls.flatten(0, 1).mean(0).double()
    cls = model.student["backbone"](model.pixel_norm(batch.global_crops), batch.masks).cls_token.detach().double()
    spread = (cls / cls.norm(dim=1, keepdim=True)).std(0, correction=0).mean() * math.sqrt(cls.shape[1])
    batch.targets = targets
    metrics = model(batch).metrics
    assert metrics["prototype_perplexity"].item() == pytest.approx(math.exp(-(mean * mean.log()).sum()), rel=1e-4)
    assert metrics["feature_std_relative"].item() == pytest.approx(spread.item(), rel=1e-3)


@pytest.mark.parametrize("mask_share", [0.5, 0.0, 1.0])
@pytest.mark.parametrize(
    ("opts", "terms"),
    [
        ([], ["dino_global", "dino_local", "ibot", "koleo"]),
        (["MODEL.IBOT_HEAD.SEPARATE", True], ["dino_global", "dino_local", "ibot", "koleo"]),
        (["MODEL.LOSS.DINO_WEIGHT", 0], ["ibot", "koleo"]),
        (["MODEL.LOSS.DINO_WEIGHT", 0, "MODEL.IBOT_HEAD.SEPARATE", True, "MODEL.LOSS.KOLEO_WEIGHT", 0], ["ibot"]),
        (["MODEL.LOSS.IBOT_WEIGHT", 0], ["dino_global", "dino_local", "koleo"]),
        (["MODEL.LOSS.CENTERING", "sinkhorn_knopp"], ["dino_global", "dino_local", "ibot", "koleo"]),
    ],
)
def test_each_loss_switches_off_and_every_trainable_parameter_keeps_a_gradient(
    tiny_cfg: CfgNode, opts: list[Any], terms: list[str], mask_share: float
) -> None:
    model = _model(tiny_cfg, *opts)
    losses = model(_batch(mask_share=mask_share))
    assert [t.name for t in losses.terms] == terms
    losses.total().backward()
    assert torch.isfinite(losses.total())
    # DistributedDataParallel refuses a trainable parameter without gradient.
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_without_local_views_and_without_masks(tiny_cfg: CfgNode) -> None:
    model = _model(tiny_cfg, "MODEL.LOSS.IBOT_WEIGHT", 0)
    batch = _batch(local_views=0)
    batch.masks = None
    assert [t.name for t in model(batch).terms] == ["dino_global", "koleo"]
    with pytest.raises(ValueError, match="needs masks in the batch"):
        _model(tiny_cfg)(batch)


def test_heads_that_no_loss_uses_are_not_built(tiny_cfg: CfgNode) -> None:
    only_patches = _model(tiny_cfg, "MODEL.LOSS.DINO_WEIGHT", 0, "MODEL.IBOT_HEAD.SEPARATE", True)
    assert list(only_patches.student) == ["backbone", "ibot_head"]
    only_cls = _model(tiny_cfg, "MODEL.LOSS.IBOT_WEIGHT", 0, "MODEL.IBOT_HEAD.SEPARATE", True)
    assert list(only_cls.student) == ["backbone", "dino_head"]
    assert not only_cls.student["backbone"].mask_token.requires_grad


def test_the_centre_moves_once_per_step_in_training_and_never_in_evaluation(tiny_cfg: CfgNode) -> None:
    model, batch = _model(tiny_cfg), _batch()
    with torch.no_grad():
        output = model.teacher["backbone"](model.pixel_norm(batch.global_crops))
        mean = model.teacher["dino_head"](output.cls_token).mean(0, keepdim=True)
    model(batch)
    torch.testing.assert_close(model.dino_targets.center, 0.1 * mean)
    first = model.dino_targets.center.clone()
    model.eval()
    model(batch)
    assert torch.equal(model.dino_targets.center, first)
    assert {"dino_targets.center", "ibot_targets.center"} <= model.state_dict().keys()


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_loss_gradients_and_centres_of_the_whole_batch(
    tiny_cfg: CfgNode, centering: str, parts: int
) -> None:
    koleo = ["MODEL.LOSS.KOLEO_GROUP_SIZE", 2] if parts == 2 else ["MODEL.LOSS.KOLEO_WEIGHT", 0]
    opts = ["MODEL.LOSS.CENTERING", centering, "MODEL.IBOT_HEAD.SEPARATE", True, *koleo]
    whole, split = _model(tiny_cfg, *opts), _model(tiny_cfg, *opts)
    batch = _batch()
    total = whole(batch).total()
    total.backward()
    losses = [split(part).total() / parts for part in split.split_batch(batch, parts)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(torch.stack(losses).sum(), total)
    for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, p), q in zip(whole.named_buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=name)


def test_losses_are_fp32_under_autocast(tiny_cfg: CfgNode) -> None:
    model = _model(tiny_cfg)
    exact = model(_batch()).total()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _model(tiny_cfg)(_batch())
    assert {t.value.dtype for t in losses.terms} == {torch.float32}
    torch.testing.assert_close(losses.total(), exact, rtol=0.05, atol=0.05)


def test_permuting_the_images_changes_nothing(tiny_cfg: CfgNode) -> None:
    model, batch = _model(tiny_cfg), _batch()
    order = torch.tensor([2, 0, 3, 1])

    def permute(t: Tensor, views: int) -> Tensor:
        return t.unflatten(0, (views, B))[:, order].flatten(0, 1)

    assert batch.local_crops is not None
    assert batch.masks is not None
    other = SSLBatch(
        permute(batch.global_crops, 2), permute(batch.local_crops, LOCAL), permute(batch.masks, 2), order, 2, LOCAL
    )
    model.eval()
    assert _values(model(other)) == pytest.approx(_values(model(batch)), rel=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_the_losses_of_images_are_those_of_batches_of_one_image(tiny_cfg: CfgNode, separate: bool) -> None:
    """Given the targets; KoLeo, which compares images, is off."""
    model = _model(
        tiny_cfg, "MODEL.LOSS.KOLEO_WEIGHT", 0.0, "MODEL.LOSS.IBOT_WEIGHT", 0.7, "MODEL.IBOT_HEAD.SEPARATE", separate
    )
    batch = replace(_batch(), sources=torch.zeros(B, dtype=torch.int64))
    model.train(False)  # the centres stay, so the targets are the same
    alone = [model(part).total().item() for part in model.split_batch(batch, B)]
    got = model(batch)
    assert got.per_image.tolist() == pytest.approx(alone, rel=1e-4)
    assert not got.per_image.requires_grad


@pytest.mark.parametrize("weights", [(1, 1, 0.1), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0.5, 2, 3)])
def test_the_mean_of_the_images_is_the_total_and_asking_changes_nothing(
    tiny_cfg: CfgNode, weights: tuple[float, float, float]
) -> None:
    names = ("DINO_WEIGHT", "IBOT_WEIGHT", "KOLEO_WEIGHT")
    overrides = [x for name, w in zip(names, weights, strict=True) for x in (f"MODEL.LOSS.{name}", float(w))]
    totals, gradients = [], []
    for sources in (None, torch.arange(B) % 2):
        model = _model(tiny_cfg, *overrides)
        terms = model(replace(_batch(), sources=sources))
        terms.total().backward()
        totals.append(terms.total().item())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert terms.per_image is not None
    assert terms.per_image.shape == (B,)
    assert terms.per_image.mean().item() == pytest.approx(totals[1], rel=1e-5)
    assert totals[0] == totals[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
