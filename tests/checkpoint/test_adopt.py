"""MODEL.WEIGHTS of every layout, into models with a student and a teacher."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointError
from dinoengine.checkpoint.adopt import fit_config, hints_of_config, require_same_backbone, say_assumed_heads
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.modeling import build_model
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS, WITHOUT_SCALE, random_weights


def _cfg(spec: BackboneSpec, *overrides: Any) -> CfgNode:
    cfg = get_cfg()
    for key, value in spec.config_options().items():
        cfg.merge_from_list([key, value])
    heads = [
        "MODEL.DINO_HEAD.NUM_PROTOTYPES",
        12,
        "MODEL.DINO_HEAD.HIDDEN_DIM",
        20,
        "MODEL.DINO_HEAD.BOTTLENECK_DIM",
        8,
    ]
    heads += [
        "MODEL.IBOT_HEAD.NUM_PROTOTYPES",
        13,
        "MODEL.IBOT_HEAD.HIDDEN_DIM",
        20,
        "MODEL.IBOT_HEAD.BOTTLENECK_DIM",
        8,
    ]
    cfg.merge_from_list(
        [*heads, "INPUT.GLOBAL_CROPS.SIZE_PX", 28, "INPUT.LOCAL_CROPS.SIZE_PX", 14, "MODEL.VIT.DROP_PATH_RATE", 0.0]
    )
    if not spec.layer_scale:
        cfg.MODEL.VIT.LAYER_SCALE_INIT = 0.0
    cfg.merge_from_list([*overrides])
    return cfg


def _tokens(model: nn.Module, size: int = 28) -> torch.Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(images)
    return torch.cat((output.cls_token[:, None], output.register_tokens, output.patch_tokens), 1)


CASES = [
    ("meta", SMALL),
    ("meta", WITH_REGISTERS),
    ("meta-teacher", SMALL),
    ("huggingface", SMALL),
    ("huggingface", SWIGLU),
    ("timm", WITH_REGISTERS),
    ("cerebras", SMALL),
    ("dino", WITHOUT_SCALE),
    ("ibot", WITHOUT_SCALE),
    ("dinoengine", SMALL),
]


@pytest.mark.parametrize(("layout", "spec"), CASES, ids=[f"{n}-{s.num_register_tokens}" for n, s in CASES])
@pytest.mark.parametrize("size", [28, 42])
def test_every_layout_computes_in_the_run_what_its_file_does(
    layout: str, spec: BackboneSpec, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "weights")
    save_weights(random_weights(spec), path, layout)
    cfg = _cfg(spec, "MODEL.VIT.INTERPOLATE_ANTIALIAS", False, "MODEL.VIT.INTERPOLATE_OFFSET", 0.3)
    weights = read_weights(path)
    fit_config(cfg, weights, path)
    require_same_backbone(cfg, weights, path)
    model = build_model(cfg)
    with caplog.at_level(logging.INFO):
        Checkpointer(model, "").load_weights(path)
    assert f"layout {layout}" in caplog.text
    expected = _tokens(weights.load_backbone(), size)
    for side in (model.student, model.teacher):
        side.eval()
        torch.testing.assert_close(_tokens(side["backbone"], size), expected, rtol=0, atol=0)


def test_heads_that_the_file_has_are_taken_and_the_others_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights(heads=True)
    save_weights(weights, str(tmp_path / "t.pth"), "meta-teacher")
    model = build_model(_cfg(SMALL, "MODEL.IBOT_HEAD.SEPARATE", True))
    Checkpointer(model, "").load_weights(str(tmp_path / "t.pth"), for_training=True)
    for side in ("student", "teacher"):
        for head in ("dino_head", "ibot_head"):
            state = model.get_submodule(f"{side}.{head}").state_dict()
            assert all(torch.equal(state[name], value) for name, value in weights.parts[head].items())
    assert "initial values: dino_targets, ibot_targets" in caplog.text

    shared = build_model(_cfg(SMALL))
    Checkpointer(shared, "").load_weights(str(tmp_path / "t.pth"))
    assert "not used by this model: ibot_head" in caplog.text


@pytest.mark.parametrize("for_training", [True, False])
def test_missing_heads_are_a_warning_for_a_training_and_an_info_for_an_evaluation(
    for_training: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A foreign file has a backbone alone, which is all that features depend on."""
    save_weights(random_weights(), str(tmp_path / "b.pth"), "meta")
    with caplog.at_level(logging.INFO):
        Checkpointer(build_model(_cfg(SMALL)), "").load_weights(str(tmp_path / "b.pth"), for_training=for_training)
    (record,) = [r for r in caplog.records if r.getMessage().startswith("Not in ")]
    assert "student.dino_head, teacher.dino_head" in record.getMessage()
    assert record.levelno == (logging.WARNING if for_training else logging.INFO)


def test_a_classifier_without_its_head_is_a_warning_in_any_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_weights(random_weights(), str(tmp_path / "b.pth"), "meta")
    classifier = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "MODEL.CLASSIFIER.NUM_CLASSES", 3]
    Checkpointer(build_model(_cfg(SMALL, *classifier)), "").load_weights(str(tmp_path / "b.pth"))
    (record,) = [r for r in caplog.records if r.getMessage().startswith("Not in ")]
    assert (record.levelno, record.getMessage().endswith("initial values: head.")) == (logging.WARNING, True)


def test_student_teacher_heads_and_centres_of_a_full_file_stay_apart(tmp_path: Path) -> None:
    source = build_model(_cfg(SMALL))
    with torch.no_grad():
        for value in source.state_dict().values():
            value.add_(torch.randn_like(value))
    Checkpointer(source, str(tmp_path)).save("own", iteration=4, config=_cfg(SMALL).dump())
    weights = read_weights(str(tmp_path / "own.pth"))
    save_weights(weights, str(tmp_path / "cerebras.mdl"), "cerebras")
    model = build_model(_cfg(SMALL))
    Checkpointer(model, "").load_weights(str(tmp_path / "cerebras.mdl"))
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["meta", "timm"])
def test_a_mask_token_that_was_never_trained_is_renewed_for_training_alone(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights()
    weights.backbone["mask_token"].zero_()
    save_weights(weights, str(tmp_path / "w.pth"), layout)
    model = build_model(_cfg(SMALL))
    Checkpointer(model, "").load_weights(str(tmp_path / "w.pth"))
    assert not model.teacher["backbone"].mask_token.any()
    assert "mask token" not in caplog.text
    Checkpointer(model, "").resume_or_load(str(tmp_path / "w.pth"), resume=False)
    tokens = [side["backbone"].mask_token for side in (model.student, model.teacher)]
    assert torch.equal(*tokens)
    assert 0.01 < tokens[0].std() < 0.03
    assert caplog.text.count("The mask token of") == 1


def test_a_trained_mask_token_is_kept(tmp_path: Path) -> None:
    weights = random_weights()
    save_weights(weights, str(tmp_path / "w.pth"), "meta")
    model = build_model(_cfg(SMALL))
    Checkpointer(model, "").resume_or_load(str(tmp_path / "w.pth"), resume=False)
    assert torch.equal(model.student["backbone"].mask_token, weights.backbone["mask_token"])


def test_the_config_takes_table_and_interpolation_from_the_file(tmp_path: Path) -> None:
    save_weights(random_weights(WITH_REGISTERS), str(tmp_path / "w.pth"), "meta")
    cfg = _cfg(WITH_REGISTERS, "MODEL.VIT.POS_EMBED_SIZE_PX", (0,), "INPUT.GLOBAL_CROPS.SIZE_PX", 56)
    cfg.MODEL.VIT.INTERPOLATE_ANTIALIAS, cfg.MODEL.VIT.INTERPOLATE_OFFSET = False, 0.1
    fit_config(cfg, read_weights(str(tmp_path / "w.pth")), "w.pth")
    vit = cfg.MODEL.VIT
    assert (vit.POS_EMBED_SIZE_PX, vit.INTERPOLATE_ANTIALIAS, vit.INTERPOLATE_OFFSET) == ((28, 28), True, 0.0)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (["MODEL.VIT.PATCH_SIZE_PX", 14], r"MODEL\.VIT\.PATCH_SIZE_PX is 14, set it to 7"),
        (["MODEL.VIT.SIZE", "small", "MODEL.VIT.EMBED_DIM", 0], r"MODEL\.VIT\.EMBED_DIM is 0, set it to 64"),
        (["MODEL.VIT.NUM_REGISTER_TOKENS", 4], r"NUM_REGISTER_TOKENS is 4, set it to 0"),
        (["MODEL.VIT.FFN", "swiglu"], r"MODEL\.VIT\.FFN is swiglu, set it to mlp"),
        (["MODEL.VIT.LAYER_SCALE_INIT", 0.0], r"LAYER_SCALE_INIT is 0\.0, set it to 1e-05"),
        (["MODEL.VIT.NUM_HEADS", 2], r"NUM_HEADS is 2, set it to 1"),
        (
            ["MODEL.VIT.POS_EMBED_SIZE_PX", 56],
            r"POS_EMBED_SIZE_PX is \(56,\), set it to \(28, 28\)(?s:.)*resize_checkpoint",
        ),
        (["MODEL.PIXEL_MEAN", (0.5,), "MODEL.PIXEL_STD", (0.5,)], r"have 1 channels, not 3"),
    ],
)
def test_another_backbone_names_the_keys_and_values_to_set(override: list[Any], problem: str, tmp_path: Path) -> None:
    save_weights(random_weights(), str(tmp_path / "w.pth"), "meta")
    weights = read_weights(str(tmp_path / "w.pth"))
    with pytest.raises(ConfigError, match=problem):
        require_same_backbone(_cfg(SMALL, *override), weights, "w.pth")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_file_that_does_not_add_up_changes_nothing(change: str, tmp_path: Path) -> None:
    entries = random_weights(replace(SMALL, table_grid=(4, 4))).backbone
    if change == "missing":
        del entries["blocks.0.attn.proj.bias"]
        entries["blocks.1.extra.bias"] = torch.zeros(3)
    elif change == "unknown":
        entries["blocks.1.extra.bias"] = torch.zeros(3)
    else:
        entries["blocks.2.norm1.bias"] = torch.zeros(3)
    torch.save(entries, tmp_path / "w.pth")
    model = build_model(_cfg(SMALL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        Checkpointer(model, "").load_weights(str(tmp_path / "w.pth"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_file_does_not_say_comes_from_the_config(tmp_path: Path) -> None:
    """Heads of another width than 64 and a table that is no square: Meta's files state neither."""
    spec = replace(SMALL, num_heads=4, table_grid=(2, 5))
    weights = random_weights(spec)
    save_weights(weights, str(tmp_path / "w.pth"), "meta")
    cfg = _cfg(spec)
    weights_in_file = read_weights(str(tmp_path / "w.pth"), hints=hints_of_config(cfg))
    fit_config(cfg, weights_in_file, "w.pth")
    require_same_backbone(cfg, weights_in_file, "w.pth")
    model = build_model(cfg)
    Checkpointer(model, "").load_weights(str(tmp_path / "w.pth"))
    torch.testing.assert_close(_tokens(model.teacher["backbone"]), _tokens(weights.load_backbone()), rtol=0, atol=0)


def test_not_strict_still_refuses_a_file_of_which_nothing_fits(tmp_path: Path) -> None:
    """The model's own entries, which stay, are no entries of the file that fit."""
    other = replace(SMALL, embed_dim=128, num_heads=2, patch_size=2, ffn_hidden=512)
    save_weights(random_weights(other), str(tmp_path / "w.pth"), "meta")
    for for_training in (False, True):
        with pytest.raises(CheckpointError, match=r"w\.pth does not fit the model \(0 of \d+ entries fit\)"):
            Checkpointer(build_model(_cfg(SMALL)), "", strict=False).load_weights(
                str(tmp_path / "w.pth"), for_training=for_training
            )


def test_not_strict_takes_what_fits_and_names_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(replace(SMALL, ffn_hidden=128))
    del weights.backbone["norm.bias"]
    torch.save(weights.backbone, tmp_path / "w.pth")
    model = build_model(_cfg(SMALL))
    Checkpointer(model, "", strict=False).load_weights(str(tmp_path / "w.pth"))
    assert torch.equal(model.teacher["backbone"].norm.weight, weights.backbone["norm.weight"])
    assert "18 of another shape: student.backbone.blocks.0.mlp.fc1.weight" in caplog.text
    assert "2 missing: student.backbone.norm.bias, teacher.backbone.norm.bias" in caplog.text


@pytest.mark.parametrize("architecture", ["ImageClassifier", "DINOv2"])
def test_a_mask_token_that_no_loss_uses_is_left_alone(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights()
    weights.backbone["mask_token"].zero_()
    save_weights(weights, str(tmp_path / "w.pth"), "meta")
    if architecture == "ImageClassifier":
        cfg = _cfg(SMALL, "MODEL.META_ARCHITECTURE", architecture, "MODEL.CLASSIFIER.NUM_CLASSES", 2)
    else:
        cfg = _cfg(SMALL, "MODEL.LOSS.IBOT_WEIGHT", 0.0)
    model = build_model(cfg)
    Checkpointer(model, "").resume_or_load(str(tmp_path / "w.pth"), resume=False)
    tokens = [value for name, value in model.state_dict().items() if name.endswith("mask_token")]
    assert tokens
    assert not any(token.any() for token in tokens)
    assert "mask token" not in caplog.text


def test_a_checkpoint_of_the_same_model_says_its_layout_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(_cfg(SMALL))
    path = Checkpointer(model, str(tmp_path), metadata={"config": _cfg(SMALL).dump()}).save("own")
    with caplog.at_level(logging.INFO):
        Checkpointer(model, "").load_weights(path)
    assert f"{path}: layout dinoengine, a checkpoint of this model" in caplog.text


def test_heads_that_a_file_of_ours_does_not_state_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint without its config says no more than Meta's files do."""
    spec = replace(SMALL, num_heads=4)
    save_weights(random_weights(spec), str(tmp_path / "w.pth"), "dinoengine")
    content = torch.load(tmp_path / "w.pth")
    for has_config in (True, False):
        caplog.clear()
        torch.save(content if has_config else {"model": content["model"]}, tmp_path / "w.pth")
        cfg = _cfg(spec)
        say_assumed_heads(read_weights(str(tmp_path / "w.pth"), hints=hints_of_config(cfg)), "w.pth")
        assert ("w.pth does not state its attention heads" in caplog.text) != has_config
