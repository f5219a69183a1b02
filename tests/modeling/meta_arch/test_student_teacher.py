"""Student and teacher."""

from __future__ import annotations

import torch
from torch import nn

from dinoengine.modeling import FeatureModel, build_model
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch import StudentTeacher


def _pair() -> StudentTeacher:
    def parts() -> dict[str, nn.Module]:
        return {"backbone": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))}

    return StudentTeacher(parts(), parts(), PixelNorm([0.5], [0.5]))


def test_the_teacher_starts_as_a_copy_and_is_frozen() -> None:
    model = _pair()
    for mine, his in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        assert torch.equal(mine, his)
        assert mine.data_ptr() != his.data_ptr()
        assert not mine.requires_grad
        assert his.requires_grad


def test_the_teacher_stays_in_eval_mode() -> None:
    model = _pair()
    for mode in (True, False, True):
        model.train(mode)
        assert model.student.training == mode
        assert all(not m.training for m in model.teacher.modules())


def test_the_moving_average_in_closed_form() -> None:
    model = _pair()
    start = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
        model.student["backbone"][1].running_mean.fill_(4.0)
    for _ in range(3):
        model.update_teacher(0.9)
    for before, now in zip(start, model.teacher.parameters(), strict=True):
        torch.testing.assert_close(now, before + (1 - 0.9**3))
    assert (model.teacher["backbone"][1].running_mean == 4.0).all()
    before = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))
    model.update_teacher(0.0)
    for mine, his in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(mine, his)


def test_facts_and_groups_come_from_the_parts(tiny_cfg) -> None:
    tiny_cfg.merge_from_list(["MODEL.IBOT_HEAD.SEPARATE", True, "MODEL.IBOT_HEAD.NUM_PROTOTYPES", 8])
    model = build_model(tiny_cfg)
    groups = model.clip_groups()
    assert list(groups) == ["backbone", "dino_head", "ibot_head"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(g) for g in groups.values()) == len(trainable)
    assert all(name.startswith("student.") for name in trainable)
    assert model.param_facts("student.backbone.blocks.0.attn.qkv.weight").layer_id == 1
    assert model.param_facts("student.ibot_head.last_layer.weight_g").role == "last_layer"


def test_the_feature_model_shares_the_teachers_weights(tiny_cfg) -> None:
    model = build_model(tiny_cfg)
    features = model.feature_model()
    assert isinstance(features, FeatureModel)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    before = features(images).cls_token
    expected = model.teacher["backbone"](model.pixel_norm(images)).cls_token
    assert torch.equal(before, expected)
    with torch.no_grad():
        model.teacher["backbone"].norm.bias.add_(1.0)
    torch.testing.assert_close(features(images).cls_token, before + 1.0)
    assert model.feature_model("student").backbone is model.student["backbone"]


def test_the_feature_model_of_the_teacher_knows_its_prototypes(tiny_cfg) -> None:
    model = build_model(tiny_cfg)
    features = model.feature_model()
    assert not any("head" in name for name in features.state_dict())  # so it has the hash of the backbone alone
    cls_tokens = torch.randn(3, 16)
    logits = model.teacher["dino_head"](cls_tokens)
    model.dino_targets.center.normal_()
    model.teacher_temp = 0.5  # as a schedule sets it, after the feature model was made
    expected = ((logits - model.dino_targets.center) / 0.5).softmax(-1)
    torch.testing.assert_close(features.prototype_head.probabilities(cls_tokens), expected)
    assert features.prototype_head.temp() == 0.5
    assert model.feature_model("student").prototype_head is None


def test_sinkhorn_targets_have_no_centre_and_without_the_dino_loss_there_is_no_head(tiny_cfg) -> None:
    tiny_cfg.MODEL.LOSS.CENTERING = "sinkhorn_knopp"
    model = build_model(tiny_cfg)
    cls_tokens = torch.randn(3, 16)
    expected = (model.teacher["dino_head"](cls_tokens) / model.teacher_temp).softmax(-1)
    torch.testing.assert_close(model.feature_model().prototype_head.probabilities(cls_tokens), expected)
    tiny_cfg.MODEL.LOSS.DINO_WEIGHT = 0.0
    assert build_model(tiny_cfg).feature_model().prototype_head is None
