from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoengine.config import CfgNode
from dinoengine.data import build_train_loader
from dinoengine.modeling import ImageClassifier, build_model
from dinoengine.modeling.backbone import Backbone, VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.solver import build_optimizer
from dinoengine.structures import BackboneOutput, ImageBatch, ParamFacts

DIM, DEPTH, CLASSES = 16, 5, 3


def _backbone(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=(8, 8), patch_size=4, embed_dim=DIM, depth=DEPTH, num_heads=2, layer_scale_init=0.5, **options
    )


def _model(**options: Any) -> ImageClassifier:
    backbone = options.pop("backbone", None) or _backbone()
    return ImageClassifier(
        backbone=backbone, pixel_norm=PixelNorm([0.5] * 3, [0.25] * 3), num_classes=CLASSES, **options
    )


def _batch(size: int = 6) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageBatch(images, torch.arange(size) % CLASSES, torch.arange(size))


def _blocks_by_hand(backbone: VisionTransformer, images: Tensor) -> list[Tensor]:
    """All tokens [B, 1 + N, D] after each block and the final norm."""
    pixels = (images.float() / 255 - 0.5) / 0.25
    patches = backbone.patch_embed(pixels)
    tokens = torch.cat((backbone.cls_token.expand(len(images), -1, -1), patches), dim=1) + backbone.pos_embed
    outputs = []
    for block in backbone.blocks:
        (tokens,) = block([tokens])
        outputs.append(backbone.norm(tokens))
    return outputs


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("mean_patch", [False, True])
def test_logits_are_the_head_on_cls_tokens_oldest_first_then_the_mean_patch(num_blocks: int, mean_patch: bool) -> None:
    model = _model(num_last_blocks=num_blocks, mean_patch=mean_patch).eval()
    batch = _batch()
    with torch.no_grad():
        blocks = _blocks_by_hand(model.backbone, batch.images)  # type: ignore[arg-type]
        columns = [tokens[:, 0] for tokens in blocks[-num_blocks:]]
        columns += [sum(blocks[-1][:, i] for i in range(1, 5)) / 4] if mean_patch else []  # type: ignore[list-item]
        expected = torch.cat(columns, dim=1) @ model.head.weight.T + model.head.bias
        output = model.feature_model()(batch.images)
        loss = model(batch).total()
    assert model.head.weight.shape == (CLASSES, (num_blocks + mean_patch) * DIM)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.cls_token, blocks[-1][:, 0])
    assert output.patch_tokens.shape == (6, 4, DIM)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, batch.labels))  # type: ignore[arg-type]


def test_label_smoothing_and_accuracy_by_hand() -> None:
    model = _model(label_smoothing=0.3).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
        terms = model(_batch(3))
    log_sum = math.log(math.exp(2) + 2)
    per_label = [log_sum - 2, log_sum, log_sum]  # -log p of each class; the three labels are 0, 1, 2
    target = sum(0.7 * own + 0.1 * sum(per_label) for own in per_label) / 3
    assert terms.total().item() == pytest.approx(target)
    assert terms.metrics["train_top1"].item() == pytest.approx(100 / 3)


def test_the_head_starts_as_published() -> None:
    torch.manual_seed(0)
    model = ImageClassifier(backbone=_backbone(), pixel_norm=PixelNorm([0.5], [0.25]), num_classes=4000)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.head.bias.any()


def test_a_frozen_backbone_is_not_touched() -> None:
    model = _model(backbone=_backbone(drop_path_rate=0.5))
    assert model.training
    assert not model.backbone.training
    assert not any(module.training for module in model.backbone.modules())
    losses = [model(_batch()).total() for _ in range(2)]
    assert losses[0] == losses[1]  # no stochastic depth
    losses[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert list(model.clip_groups()) == ["head"]
    assert not model.eval().training
    assert not model.train().backbone.training


def test_fine_tuning_reaches_every_parameter_but_the_mask_token() -> None:
    model = _model(freeze_backbone=False, num_last_blocks=4, mean_patch=True)
    assert model.backbone.training
    model(_batch()).total().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["backbone.mask_token"]
    assert {name: len(group) for name, group in model.clip_groups().items()} == {
        "backbone": len(list(model.backbone.parameters())) - 1,
        "head": 2,
    }


def test_layer_decay_and_weight_decay(classifier_cfg: CfgNode) -> None:
    classifier_cfg.merge_from_list(
        ["MODEL.CLASSIFIER.FREEZE_BACKBONE", False, "SOLVER.LAYER_DECAY", 0.5, "SOLVER.PATCH_EMBED_LR_MULT", 1.0]
    )
    optimizer = build_optimizer(classifier_cfg, build_model(classifier_cfg))
    facts = {
        name: (group["lr_mult"], group["wd_mult"]) for group in optimizer.param_groups for name in group["param_names"]
    }
    assert facts["head.weight"] == (1.0, 1.0)
    assert facts["head.bias"] == (1.0, 0.0)
    assert facts["backbone.norm.weight"] == (1.0, 0.0)
    assert facts["backbone.blocks.0.attn.qkv.weight"] == (0.5, 1.0)  # one block deep
    assert facts["backbone.patch_embed.proj.weight"] == (0.25, 1.0)


def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    model = _model(freeze_backbone=False)
    batch = _batch()
    model(batch).total().backward()
    whole = model.head.weight.grad.clone()
    model.zero_grad()
    for part in batch.split(3):
        (model(part).total() / 3).backward()
    torch.testing.assert_close(model.head.weight.grad, whole)


def test_mixed_targets_are_smoothed_like_plain_ones() -> None:
    """The loss by hand: the mean over classes of -log p, weighted by (1 - smoothing) * mixed label + smoothing / K."""
    model = _model(freeze_backbone=False, label_smoothing=0.3, mixup_alpha=0.8)
    assert model.mixing is not None
    torch.manual_seed(3)
    mixed = model.mixing(_batch())
    torch.manual_seed(3)
    terms = model(_batch())
    assert terms.metrics == {}  # two right answers
    with torch.no_grad():
        logits = model.feature_model()(mixed.images).logits
    expected = 0.0
    for row, target in zip(logits.tolist(), mixed.labels.tolist(), strict=True):  # type: ignore[union-attr]
        log_sum = math.log(sum(math.exp(x) for x in row))
        expected += sum((0.7 * t + 0.1) * (log_sum - x) for x, t in zip(row, target, strict=True)) / len(logits)
    assert terms.total().item() == pytest.approx(expected, rel=1e-5)


def test_micro_batches_of_a_mixed_batch_give_its_gradient() -> None:
    model = _model(freeze_backbone=False, mixup_alpha=0.8, cutmix_alpha=1.0)
    torch.manual_seed(5)
    model(_batch()).total().backward()
    whole = model.head.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(5)
    for part in model.split_batch(_batch(), 3):
        (model(part).total() / 3).backward()
    torch.testing.assert_close(model.head.weight.grad, whole)


def test_an_evaluation_mixes_nothing() -> None:
    model = _model(mixup_alpha=0.8).eval()
    first, second = model(_batch()), model(_batch())
    assert first.total() == second.total()
    assert first.metrics.keys() == {"train_top1"}


@pytest.mark.parametrize(
    "key, value",
    [
        ("MIXUP_ALPHA", 0.8),
        ("CUTMIX_ALPHA", 1.0),
        ("NUM_CLASSES", 5),
        ("NUM_LAST_BLOCKS", 4),
        ("MEAN_PATCH", True),
        ("FREEZE_BACKBONE", False),
        ("LABEL_SMOOTHING", 0.2),
    ],
)
def test_every_key_changes_the_step(key: str, value: Any, classifier_cfg: CfgNode) -> None:
    classifier_cfg.MODEL.VIT.DEPTH = 4
    batch = next(iter(build_train_loader(classifier_cfg)))

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = build_model(classifier_cfg)
        model(batch).total().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    classifier_cfg.merge_from_list([f"MODEL.CLASSIFIER.{key}", value])
    after = gradients()
    assert before.keys() != after.keys() or any(
        before[name].shape != after[name].shape or not torch.equal(before[name], after[name]) for name in before
    )


class OneBlock(Backbone):
    """Gives its last tokens only."""

    embed_dim, patch_size, num_layers = 3, 4, 1

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> BackboneOutput:
        tokens = self.norm(images).mean((2, 3))[:, None]
        return BackboneOutput(tokens[:, 0], tokens[:, :0], tokens, (1, 1))

    def param_facts(self, name: str) -> ParamFacts:
        return ParamFacts()


def test_statistics_of_a_frozen_backbone_stay() -> None:
    model = _model(backbone=OneBlock())
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model(_batch()).total().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NUM_LAST_BLOCKS is 4, and the backbone has 2 blocks"):
        _model(
            backbone=VisionTransformer(img_size=(8, 8), patch_size=4, embed_dim=16, depth=2, num_heads=2),
            num_last_blocks=4,
        )
    with pytest.raises(ValueError, match=r"OneBlock gives the tokens of its last block only .*NUM_LAST_BLOCKS 1"):
        _model(backbone=OneBlock(), num_last_blocks=4)
    with pytest.raises(ValueError, match=r"NUM_CLASSES of at least 1, got 0"):
        ImageClassifier(backbone=OneBlock(), pixel_norm=PixelNorm([0.5], [0.5]), num_classes=0)
    batch = _batch()
    batch.labels = None
    with pytest.raises(ValueError, match="trained with labels, and this batch has none"):
        _model()(batch)


def test_only_the_backbone_is_held_back_while_the_head_warms_up() -> None:
    model = _model(freeze_backbone=False)
    for name, _ in model.named_parameters():
        assert model.param_facts(name).in_backbone == name.startswith("backbone."), name


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"mixup_alpha": 0.8}])
def test_the_losses_of_images_have_the_loss_as_mean(options: dict[str, float]) -> None:
    model, batch = _model(**options), _batch()
    assert model(batch).per_image is None
    terms = model(replace(batch, sources=torch.zeros(6, dtype=torch.int64)))
    assert terms.per_image.shape == (6,)
    assert not terms.per_image.requires_grad
    assert terms.per_image.mean().item() == pytest.approx(terms.total().item(), rel=1e-6)
    if not options:
        alone = [model(part).total().item() for part in batch.split(6)]
        assert terms.per_image.tolist() == pytest.approx(alone, rel=1e-5)
