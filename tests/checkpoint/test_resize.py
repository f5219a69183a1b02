"""Files resized: what is said, what stays, what is refused."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import Checkpointer, CheckpointError, resize
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.resize import Target, resize_checkpoint, resize_weights
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.config import CfgNode, get_cfg
from dinoengine.modeling import build_model
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS, WITHOUT_SCALE, random_weights
from tests.tools.tools import load_tool


def _save(path: Path, layout: str = "meta", spec: BackboneSpec = SMALL) -> str:
    save_weights(random_weights(spec, layout), str(path), layout)
    return str(path)


@pytest.mark.parametrize(
    ("layout", "spec", "target", "size"),
    [
        ("meta", SMALL, Target(img_size=(42, 42)), (6, 6)),
        ("meta", WITH_REGISTERS, Target(img_size=(21, 21)), (3, 3)),
        ("meta-teacher", SMALL, Target(img_size=(14, 42)), (2, 6)),
        ("dinoengine", WITH_REGISTERS, Target(img_size=(35, 14)), (5, 2)),
        ("cerebras", SMALL, Target(img_size=(21, 42)), (3, 6)),
        ("dino", WITHOUT_SCALE, Target(img_size=(42, 42)), (6, 6)),
        ("ibot", WITHOUT_SCALE, Target(img_size=(14, 21)), (2, 3)),
        ("timm", SWIGLU, Target(img_size=(21, 42), patch_size=21, in_chans=1), (1, 2)),
        ("timm", WITH_REGISTERS, Target(num_registers=5, patch_size=14), (2, 2)),
        ("huggingface", SMALL, Target(img_size=(14, 14), in_chans=4, num_registers=2), (2, 2)),
    ],
)
def test_every_layout(
    layout: str,
    spec: BackboneSpec,
    target: Target,
    size: tuple[int, int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = _save(tmp_path / "in", layout, spec=spec)
    with caplog.at_level(logging.INFO):
        results = resize_checkpoint(source, str(tmp_path / "out"), target)
    assert all(result.agrees for result in results if result.must_agree)
    old = read_weights(source)
    new = read_weights(str(tmp_path / "out"), hints=Hints(table_grid=size))
    assert (new.layout, new.spec.table_grid) == (layout, size)
    changed = [n for n, v in new.backbone.items() if n not in old.backbone or not torch.equal(v, old.backbone[n])]
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("changed: backbone.")]
    assert sorted(line.split()[1] for line in said) == sorted(f"backbone.{name}" for name in changed)
    assert f"All other {len(new.backbone) - len(changed)} entries are bitwise unchanged." in caplog.text
    states_no_grid = size[0] != size[1] and layout != "dinoengine"
    assert (f"is read, give --grid {size[0]} {size[1]}" in caplog.text) == states_no_grid


def test_a_rectangle_becomes_a_square_and_the_hint_is_of_the_source_alone(tmp_path: Path) -> None:
    source = _save(tmp_path / "in.pth", spec=replace(SMALL, table_grid=(2, 8)))
    assert read_weights(source).spec.table_grid == (4, 4)  # 16 positions: the file cannot say more
    results = resize_checkpoint(
        source, str(tmp_path / "out.pth"), Target(img_size=(28, 28)), hints=Hints(table_grid=(2, 8))
    )
    assert all(result.agrees for result in results)
    told = read_weights(source, hints=Hints(table_grid=(2, 8))).load_backbone()
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected, got = told(images), read_weights(str(tmp_path / "out.pth")).load_backbone()(images)
    torch.testing.assert_close(got.patch_tokens, expected.patch_tokens, rtol=1e-4, atol=1e-4)


def test_a_training_checkpoint_goes_on_in_a_resized_model(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tiny_cfg)
    trainer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = Checkpointer(model, str(tmp_path), metadata={"config": tiny_cfg.dump()}, trainer=trainer)  # type: ignore[arg-type]
    source = checkpointer.save("full", iteration=7)
    out = str(tmp_path / "out.pth")
    with caplog.at_level(logging.INFO):
        resize_checkpoint(source, out, Target(img_size=(12, 24), patch_size=6, in_chans=1, num_registers=2))
    assert "Left out, as it belongs to the training of the old model: trainer, iteration." in caplog.text
    for line in (
        "changed: student.backbone.pos_embed [1, 5, 16] -> [1, 9, 16]",
        "changed: backbone.patch_embed.proj.weight [16, 3, 4, 4] -> [16, 1, 6, 6]",
        "changed: config MODEL.VIT.PATCH_SIZE_PX 4 -> 6",
        "changed: config INPUT.FORMAT RGB -> L",
    ):
        assert line in caplog.text
    content = torch.load(out)
    assert content.keys() == {"model", "config"}
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(content["config"]))
    (mean,) = cfg.MODEL.PIXEL_MEAN
    assert mean == pytest.approx(sum(tiny_cfg.MODEL.PIXEL_MEAN) / 3)
    cfg.INPUT.GLOBAL_CROPS.SIZE_PX = (12,)
    resized = build_model(cfg)
    Checkpointer(resized, str(tmp_path)).load(out, weights_only=True)
    before, after = model.state_dict(), resized.state_dict()
    kept = [n for n in after if n in before and torch.equal(after[n], before[n])]
    changed = {n.partition("backbone.")[2] for n in after if n not in kept}
    assert changed == {"pos_embed", "patch_embed.proj.weight", "register_tokens"}
    assert {"dino_targets.center", "student.dino_head.last_layer.weight_v"} <= set(kept)


def test_half_precision_is_rounded_after_the_check(tmp_path: Path) -> None:
    weights = random_weights()
    torch.save({name: value.half() for name, value in weights.backbone.items()}, tmp_path / "in.pth")
    results = resize_checkpoint(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), Target(img_size=(42, 42)))
    assert all(result.agrees for result in results)
    assert {value.dtype for value in torch.load(tmp_path / "out.pth").values()} == {torch.float16}


def test_chunks_of_blocks_stay(tmp_path: Path) -> None:
    save_weights(random_weights(), str(tmp_path / "in.pth"), "meta-teacher", block_chunks=3)
    resize_checkpoint(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), Target(img_size=(14, 14)))
    names = [set(torch.load(tmp_path / name)["teacher"]) for name in ("in.pth", "out.pth")]
    assert names[0] == names[1]


def test_registers_change_the_rule_of_interpolation_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _save(tmp_path / "in.pth")
    for to, is_said in (("meta", True), ("dinoengine", False)):  # whose config states the rule
        caplog.clear()
        with caplog.at_level(logging.INFO):
            results = resize_checkpoint(source, str(tmp_path / to), Target(num_registers=3), to=to)
        assert ("antialias False, offset 0.1 -> antialias True, offset 0" in caplog.text) == is_said
        assert "for information: train them in" in results[0].line()
        assert results[0].difference > 0.01


def test_a_smaller_patch_is_for_information(tmp_path: Path) -> None:
    _, results = resize_weights(random_weights(), Target(patch_size=4, img_size=(16, 16)))
    assert [(r.agrees, r.must_agree) for r in results] == [(False, False)]


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (Target(patch_size=8), r"28 x 28 is no multiple of the patch size 8; give one that is \(--img-size 24 24\)"),
        (Target(img_size=(28, 30)), r"28 x 30 is no multiple of the patch size 7.*--img-size 28 28"),
        (Target(img_size=(0, 28)), "image size must be at least 1; got 0"),
        (Target(patch_size=0), "patch size must be at least 1; got 0"),
        (Target(in_chans=-1), "number of channels must be at least 1; got -1"),
        (Target(num_registers=3), "can be added, not removed: there are 4; got 3"),
        (Target(img_size=(28, 28), patch_size=7, in_chans=3, num_registers=4), "Nothing to change: it is ViT/7"),
        (Target(), "Nothing to change"),
    ],
)
def test_what_cannot_be(target: Target, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        resize_weights(random_weights(WITH_REGISTERS), target)


@pytest.mark.parametrize("wrong", ["pos_embed", "patch_embed.proj.weight"])
def test_nothing_is_written_when_a_check_fails(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table whose CLS row moved to the end, and a kernel that is merely scaled like a picture."""
    source = _save(tmp_path / "in.pth")
    step = {"pos_embed": "with_table_grid", "patch_embed.proj.weight": "with_patch_size"}[wrong]
    right = getattr(resize, step)

    def damaged(weights, value):  # type: ignore[no-untyped-def]
        new = right(weights, value)
        entry = new.backbone[wrong]
        new.backbone[wrong] = entry.roll(1, dims=1) if wrong == "pos_embed" else entry * 1.5
        return new

    monkeypatch.setattr(resize, step, damaged)
    target = Target(img_size=(42, 42)) if wrong == "pos_embed" else Target(patch_size=14, img_size=(56, 56))
    with pytest.raises(CheckpointError, match="does not compute what it should, so nothing was written"):
        resize_checkpoint(source, str(tmp_path / "out.pth"), target)
    assert os.listdir(tmp_path) == ["in.pth"]


def test_a_layout_that_has_no_place_for_it(tmp_path: Path) -> None:
    source = _save(tmp_path / "in.mdl", "cerebras")
    for target, match in (
        (Target(in_chans=1), "cerebras layout cannot hold.*1 channels"),
        (Target(num_registers=1), "no place for: register_tokens"),
    ):
        with pytest.raises(CheckpointError, match=match):
            resize_checkpoint(source, str(tmp_path / "out"), target)
    with pytest.raises(CheckpointError, match="exists already"):
        resize_checkpoint(source, source, Target(img_size=(14, 14)))
    assert os.listdir(tmp_path) == ["in.mdl"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("resize_checkpoint")
    source, out = _save(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    assert tool.main([source, out, "--img-size", "14", "35", "--to", "dinoengine"]) == 0
    assert read_weights(out).spec.img_size == (14, 35)
    assert "changed: backbone.pos_embed [1, 17, 64] -> [1, 11, 64]" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        tool.main([source, out, "--img-size", "14"])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([source, out, "--img-size", "1", "2", "3"])
    assert "takes one or two numbers; got 3" in capsys.readouterr().err
