"""What is said of a file is what is in it."""

from __future__ import annotations

import datetime
import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import CheckpointError, read_checkpoint
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.layouts import Hints
from dinoengine.checkpoint.summary import OVERRIDES, render, summarize
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.config import get_cfg
from dinoengine.modeling.backbone.vit import VisionTransformer
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS, WITHOUT_SCALE, random_entries, random_weights
from tests.tools.tools import ROOT, load_tool


def _save(path: Path, layout: str, spec: BackboneSpec = SMALL, **more: bool) -> str:
    save_weights(random_weights(spec, layout, **more), str(path), layout)
    return str(path)


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("dinoengine", WITH_REGISTERS),
        ("meta", SMALL),
        ("meta-teacher", SWIGLU),
        ("huggingface", WITH_REGISTERS),
        ("timm", SMALL),
        ("cerebras", SMALL),
        ("dino", WITHOUT_SCALE),
        ("ibot", WITHOUT_SCALE),
    ],
)
@pytest.mark.parametrize("config", ["", "configs/quickstart/digits.yaml"])
def test_every_layout_and_its_overrides_build_the_model(
    layout: str, spec: BackboneSpec, config: str, tmp_path: Path
) -> None:
    summary = summarize(_save(tmp_path / "file", layout, spec))
    assert summary["layout"].startswith(f"{layout}: ")
    assert summary["architecture"] == spec.describe()
    assert (summary["registers"], summary["image size"]) == (str(spec.num_register_tokens), "28 x 28 pixels")
    assert (summary["missing"], summary["unused"]) == ("-", "-")
    cfg = get_cfg()
    if config:
        cfg.merge_from_file(str(ROOT / config))
    cfg.MODEL.PIXEL_MEAN = (0.5,) * 3
    cfg.merge_from_list(shlex.split(summary[OVERRIDES]))
    built = VisionTransformer(**VisionTransformer.from_config(cfg)).state_dict()
    assert {n: v.shape for n, v in built.items()} == {n: v.shape for n, v in spec.build("meta").state_dict().items()}


def test_everything_a_training_checkpoint_has(tmp_path: Path) -> None:
    weights = random_weights(replace(SMALL, in_chans=1), heads=True)
    weights.parts["student.backbone"] = random_entries(weights.spec.build())
    weights.parts["centers"] = {"dino": torch.zeros(1, 12), "ibot": torch.zeros(1, 13)}
    weights.backbone["mask_token"].zero_()
    path = str(tmp_path / "own.pth")
    save_weights(weights, path, "dinoengine")
    content = read_checkpoint(path)
    content["model"]["teacher.backbone.norm.bias"] = torch.zeros(64, dtype=torch.float16)
    del content["model"]["teacher.backbone.blocks.1.norm2.bias"]
    torch.save({**content, "iteration": 12345}, path)
    summary = summarize(path)
    assert summary["DINO head"] == "12 prototypes, hidden 20, bottleneck 8"
    assert summary["iBOT head"] == "13 prototypes, hidden 20, bottleneck 8"
    assert summary["centres"] == "dino [1, 12], ibot [1, 13]"
    assert (summary["student"], summary["iteration"], summary["config of a run"]) == ("backbone", "12,345", "-")
    assert summary["mask token"] == "all zero: a distilled release, never trained on masks"
    assert summary["missing"] == "1: blocks.1.norm2.bias"
    num_values = sum(value.numel() for name, value in weights.backbone.items() if name != "blocks.1.norm2.bias")
    assert summary["parameters of the backbone"] == f"{num_values:,}"
    num_entries = sum(len(entries) for entries in weights.parts.values()) - 1
    assert summary["entries"] == f"{num_entries} ({num_entries - 1} float32, 1 float16)"
    assert summary["file size"] == f"{Path(path).stat().st_size / 1e6:.1f} MB"
    assert "MODEL.PIXEL_MEAN '(0.5,)'" in summary[OVERRIDES]


def test_a_mask_token_is_trained_zero_or_not_there(tmp_path: Path) -> None:
    assert summarize(_save(tmp_path / "meta", "meta"))["mask token"] == "trained"
    assert summarize(_save(tmp_path / "timm", "timm"))["mask token"] == "none in the timm layout"


def test_the_head_of_a_classifier(tmp_path: Path) -> None:
    weights = random_weights()
    weights.parts["linear_head"] = {"weight": torch.zeros(5, 128), "bias": torch.zeros(5)}
    torch.save({"model": {f"backbone.{n}": v for n, v in weights.backbone.items()}}, tmp_path / "plain.pth")
    assert summarize(str(tmp_path / "plain.pth"), hints=Hints(num_heads=1))["linear head"] == "-"
    save_weights(weights, str(tmp_path / "classifier.pth"), "dinoengine")
    assert summarize(str(tmp_path / "classifier.pth"))["linear head"] == "5 classes of 128 features"


def test_a_large_model_takes_no_memory_beyond_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path / "x.pth", "meta")
    build = BackboneSpec.build

    def only_meta(spec: BackboneSpec, device: str = "cpu") -> VisionTransformer:
        assert device == "meta"
        return build(spec, device)

    monkeypatch.setattr(BackboneSpec, "build", only_meta)
    assert "ViT/7" in summarize(path)["architecture"]


def test_a_table_that_is_no_square_needs_the_hint(tmp_path: Path) -> None:
    path = _save(tmp_path / "wide.pth", "meta", replace(SMALL, table_grid=(2, 5)))
    with pytest.raises(CheckpointError, match="--grid ROWS COLUMNS"):
        summarize(path)
    assert summarize(path, hints=Hints(table_grid=(2, 5)))["image size"] == "14 x 35 pixels"


def test_several_files_stand_side_by_side_and_damaged_ones_are_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, timm = _save(tmp_path / "meta.pth", "meta"), _save(tmp_path / "timm.pth", "timm", WITH_REGISTERS)
    bad = {name: str(tmp_path / name) for name in ("empty.pth", "cut.pth", "foreign.pth", "pickled.pth", "none.pth")}
    (tmp_path / "empty.pth").touch()
    (tmp_path / "cut.pth").write_bytes(Path(meta).read_bytes()[:5000])
    torch.save({"fc.weight": torch.zeros(2)}, bad["foreign.pth"])
    torch.save({"when": datetime.datetime(2026, 1, 1)}, bad["pickled.pth"])
    assert load_tool("inspect_checkpoint").main([meta, *bad.values(), timm]) == 2
    done = capsys.readouterr()
    errors = done.err.splitlines()
    assert len(errors) == len(bad)
    for line, path in zip(errors, bad.values(), strict=True):
        assert line.startswith("error: ")
        assert path in line
    assert "found: datetime.datetime" in errors[3]
    assert [line.split() for line in done.out.splitlines() if line.startswith("registers")] == [["registers", "0", "4"]]
    assert f"{timm}: MODEL.VIT.EMBED_DIM 64" in done.out
    assert load_tool("inspect_checkpoint").main([meta]) == 0


def test_all_cells_are_shown_whole(tmp_path: Path) -> None:
    summary = summarize(_save(tmp_path / "x.pth", "meta"))
    text = render({"a": summary, "b": summary})
    assert all(value in text for name, value in summary.items() if len(value) <= 48)


def test_the_table_comes_before_the_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one terminal the line about a bad file must not stand above a table that scrolls it away."""
    both = io.StringIO()
    monkeypatch.setattr("sys.stdout", both)
    monkeypatch.setattr("sys.stderr", both)
    good = _save(tmp_path / "good.pth", "meta")
    assert load_tool("inspect_checkpoint").main([str(tmp_path / "none.pth"), good]) == 2
    lines = both.getvalue().splitlines()
    assert lines[-1].startswith("error: ")
    assert "none.pth" in lines[-1]


def test_entries_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weights = random_weights()
    weights.backbone["blocks.1.norm1.bias"][3] = float("nan")
    torch.save(weights.backbone, tmp_path / "x.pth")
    assert summarize(str(tmp_path / "x.pth"))["not finite"] == "1: blocks.1.norm1.bias"
    assert summarize(_save(tmp_path / "y.pth", "meta"))["not finite"] == "-"


def test_whose_config_it_is(tmp_path: Path) -> None:
    weights = random_weights(layout="dinoengine")
    save_weights(weights, str(tmp_path / "converted.pth"), "dinoengine")
    assert summarize(str(tmp_path / "converted.pth"))["config of a run"] == "-"
    save_weights(replace(weights, config=str(get_cfg().dump())), str(tmp_path / "run.pth"), "dinoengine")
    assert summarize(str(tmp_path / "run.pth"))["config of a run"] == "in the file"
