"""Backbones of several layouts become classifiers; what does not fit is refused and leaves nothing behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import Checkpointer, CheckpointError
from dinoengine.checkpoint import classifier as classifier_module
from dinoengine.checkpoint.classifier import convert_to_classifier
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.parity import Comparison
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from dinoengine.config import CfgNode, get_cfg
from dinoengine.engine import SSLTrainer
from dinoengine.modeling import build_model
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch import classifier as meta_arch
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS, WITHOUT_SCALE, random_weights


def _source(folder: Path, weights: Weights | None = None, to: str = "meta") -> str:
    path = folder / ("in" if to == "huggingface" else "in.pth")
    save_weights(weights or random_weights(), str(path), to)
    return str(path)


def _config(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


LAYOUTS = [
    ("meta", SMALL),
    ("meta", WITH_REGISTERS),
    ("meta", SWIGLU),
    ("meta-teacher", SMALL),
    ("huggingface", WITH_REGISTERS),
    ("timm", SMALL),
    ("cerebras", SMALL),
    ("dino", WITHOUT_SCALE),
    ("ibot", WITHOUT_SCALE),
    ("dinoengine", SMALL),
]


@pytest.mark.parametrize("to, spec", LAYOUTS, ids=[f"{to}-{i}" for i, (to, _) in enumerate(LAYOUTS)])
def test_every_layout_becomes_a_classifier(to: str, spec: BackboneSpec, tmp_path: Path) -> None:
    weights = random_weights(spec)
    source = _source(tmp_path, weights, to)
    result = convert_to_classifier(source, str(tmp_path / "cls.pth"), num_classes=7, mean_patch=True)
    assert result.agrees
    assert result.scale > 0.01  # a head of zeros would agree with anything

    cfg = _config(tmp_path / "cls.yaml")
    model = build_model(cfg)
    Checkpointer(model, "").load(cfg.MODEL.WEIGHTS, weights_only=True)  # strict
    again = read_weights(str(tmp_path / "cls.pth"))
    assert again.parts.keys() == {"backbone", "linear_head"}
    read = read_weights(source)
    assert again.spec == read.spec  # interpolation flags, too
    assert all(torch.equal(again.backbone[name], value) for name, value in read.backbone.items())
    assert set(again.backbone) - set(read.backbone) == set(read.absent)
    assert all(not again.backbone[name].any() for name in read.absent)  # the mask token of layouts without it
    assert bool(cfg.MODEL.VIT.LAYER_SCALE_INIT) == spec.layer_scale
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_teacher_of_a_run_is_taken_and_the_rest_is_named(
    tiny_cfg: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_cfg.merge_from_list(["MODEL.PIXEL_MEAN", (0.1, 0.2, 0.3), "INPUT.HFLIP_PROB", 0.0, "INPUT.TEST.RESIZE_PX", 9])
    trainer = SSLTrainer(tiny_cfg)
    trainer.bare_model.update_teacher(0.5)  # type: ignore[operator]
    with torch.no_grad():
        trainer.bare_model.student["backbone"].cls_token += 1  # type: ignore[index]
    path = trainer.checkpointer.save("model_0000000", iteration=0)
    convert_to_classifier(path, str(tmp_path / "cls.pth"), num_classes=3)
    saved = torch.load(tmp_path / "cls.pth", weights_only=True)["model"]
    teacher = trainer.bare_model.teacher["backbone"].state_dict()  # type: ignore[index]
    assert {name for name in saved if name.startswith("backbone.")} == {f"backbone.{name}" for name in teacher}
    assert all(torch.equal(saved[f"backbone.{name}"], value) for name, value in teacher.items())
    assert "no use for it: dino_head, student.backbone, student.dino_head, centers." in capsys.readouterr().out
    cfg = _config(tmp_path / "cls.yaml")
    assert cfg.MODEL.PIXEL_MEAN == (0.1, 0.2, 0.3)
    assert (cfg.INPUT.HFLIP_PROB, cfg.INPUT.TEST.RESIZE_PX, cfg.INPUT.GLOBAL_CROPS.SIZE_PX) == (0.0, 9, (8,))


def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = _source(tmp_path)
    heads = []
    for i, overrides in enumerate(([], [], ["SEED", 1])):
        torch.manual_seed(i)
        convert_to_classifier(source, str(tmp_path / f"{i}.pth"), num_classes=300, overrides=overrides)
        heads.append(torch.load(tmp_path / f"{i}.pth", weights_only=True)["model"])
    assert torch.equal(heads[0]["head.weight"], heads[1]["head.weight"])
    assert not torch.equal(heads[0]["head.weight"], heads[2]["head.weight"])
    assert heads[0]["head.weight"].std().item() == pytest.approx(0.01, rel=0.03)
    assert not heads[0]["head.bias"].any()


def test_a_classifier_of_transformers_keeps_its_head(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7, num_labels=5
    )
    model = Dinov2ForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    convert_to_classifier(str(tmp_path / "hf"), str(tmp_path / "cls.pth"))
    cfg = _config(tmp_path / "cls.yaml")
    assert (cfg.MODEL.CLASSIFIER.NUM_CLASSES, cfg.MODEL.CLASSIFIER.NUM_LAST_BLOCKS) == (5, 1)
    assert cfg.MODEL.CLASSIFIER.MEAN_PATCH
    ours = build_model(cfg)
    Checkpointer(ours, "").load(cfg.MODEL.WEIGHTS, weights_only=True)
    images = torch.rand(2, 3, 28, 28)
    features = ours.feature_model().eval()  # type: ignore[operator]
    with torch.inference_mode():
        theirs = model(features.pixel_norm(images)).logits
        torch.testing.assert_close(features(images).logits, theirs, rtol=1e-4, atol=1e-5)

    convert_to_classifier(str(tmp_path / "hf"), str(tmp_path / "new.pth"), num_classes=9)
    assert _config(tmp_path / "new.yaml").MODEL.CLASSIFIER.NUM_CLASSES == 9


def _heads(folder: Path, width: int) -> str:
    torch.save({"weight": torch.randn(6, width), "bias": torch.randn(6)}, folder / "head.pth")
    return str(folder / "head.pth")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"How many classes\? Give --num-classes, --train"),
        ({"num_classes": 0}, "NUM_CLASSES of at least 1"),
        ({"linear_head": 128, "num_classes": 7}, r"gives 6 classes from .* not what was asked for: 7 classes"),
        (
            {"linear_head": 128, "last_blocks": 4},
            "asked for: 6 classes from the CLS token of each of the last 4 blocks",
        ),
        ({"linear_head": 64, "mean_patch": True}, "which is not what was asked for"),
        ({"linear_head": 192}, "192 wide"),
        ({"linear_head": 320}, "NUM_LAST_BLOCKS is 4, and the backbone has 3 blocks"),
        ({"num_classes": 4, "train": ["digits"]}, r"NUM_CLASSES is 4, but the training set \['digits'\] has 10"),
        ({"num_classes": 4, "overrides": ["MODEL.VIT.DEPTH", 2]}, "overrides of MODEL make another model"),
        ({"num_classes": 4, "overrides": ["MODEL.VIT.DEPTH", 4]}, r"another model .*backbone\.blocks\.3"),
        ({"num_classes": 4, "overrides": ["SOLVER.BASE_LRR", 2]}, "did you mean 'SOLVER.BASE_LR'"),
        ({"num_classes": 4, "overrides": ["INPUT.TEST.CROP_SIZE_PX", 30]}, "not a multiple of MODEL.VIT.PATCH_SIZE_PX"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = _source(tmp_path)
    if "linear_head" in options:
        options = {**options, "linear_head": _heads(tmp_path, options["linear_head"])}
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=message):
        convert_to_classifier(source, str(tmp_path / "cls.pth"), **options)
    assert sorted(os.listdir(tmp_path)) == before


def test_every_entry_is_accounted_for(tmp_path: Path) -> None:
    entries = {**random_weights().backbone, "blocks.0.norm9.bias": torch.zeros(1)}
    torch.save(entries, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"1 without a place: blocks\.0\.norm9\.bias"):
        convert_to_classifier(str(tmp_path / "in.pth"), str(tmp_path / "cls.pth"), num_classes=3)
    convert_to_classifier(str(tmp_path / "in.pth"), str(tmp_path / "cls.pth"), num_classes=3, allow=["*norm9*"])


def test_nothing_is_overwritten_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = _source(tmp_path), tmp_path / "cls.pth"
    (tmp_path / "cls.yaml").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cls\.yaml exists already; choose another name, or give --overwrite"):
        convert_to_classifier(source, str(target), num_classes=3)
    with pytest.raises(CheckpointError, match=r"OUT must end in \.pth"):
        convert_to_classifier(source, str(tmp_path / "cls"), num_classes=3)
    with monkeypatch.context() as patch:
        patch.setattr(classifier_module, "_compare", lambda *_: Comparison("it", float("nan"), 1.0))
        with pytest.raises(CheckpointError, match="does not compute what its parts do, so nothing was written"):
            convert_to_classifier(source, str(target), num_classes=3, overwrite=True)
    assert (tmp_path / "cls.yaml").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["cls.yaml", "in.pth"]
    convert_to_classifier(source, str(target), num_classes=3, overwrite=True)
    assert _config(tmp_path / "cls.yaml").MODEL.CLASSIFIER.NUM_CLASSES == 3


@pytest.mark.parametrize("wrong", ["order of blocks", "features", "head", "pixels"])
def test_the_check_sees_a_wrong_classifier(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = meta_arch.head_input
    if wrong == "order of blocks":
        monkeypatch.setattr(meta_arch, "head_input", lambda outputs, mean: right([*outputs[-2::-1], outputs[-1]], mean))
    elif wrong == "features":
        monkeypatch.setattr(meta_arch, "head_input", lambda outputs, mean: right(outputs, mean) * 1.01)
    elif wrong == "head":  # the backbone's own layers change on both sides alike
        monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x @ (1.01 * self.weight.T) + self.bias)
    else:
        monkeypatch.setattr(PixelNorm, "forward", lambda self, x: x / 255.0)
    source = _source(tmp_path, random_weights(replace(SMALL, depth=4)))
    with pytest.raises(CheckpointError, match="does not compute what its parts do"):
        convert_to_classifier(source, str(tmp_path / "cls.pth"), num_classes=5, last_blocks=4, mean_patch=True)
