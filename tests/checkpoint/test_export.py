"""Exported files run, at one size and any batch, and hold no interpolation."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import CheckpointError, export
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.export import EXPORTERS, Exporter, Outputs, export_backbone
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.config import get_cfg
from tests.checkpoint.models import SMALL, WITH_REGISTERS, random_weights
from tests.tools.tools import load_tool

ONE_BLOCK = replace(WITH_REGISTERS, depth=1)


def _save(path: Path, spec: BackboneSpec = ONE_BLOCK, layout: str = "dinoengine") -> str:
    """A converted file; with a run's config in it if the layout is ours."""
    config = str(get_cfg().dump()) if layout == "dinoengine" else None
    save_weights(replace(random_weights(spec, layout), config=config), str(path), layout)
    return str(path)


@pytest.mark.slow
def test_onnx_runs_by_its_names_and_says_how_to_normalise(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    source, out = _save(tmp_path / "in.pth"), str(tmp_path / "out.onnx")
    results = export_backbone(source, out, "onnx", img_size=(14, 35))
    names = ("cls_token", "register_tokens", "patch_tokens")
    assert [r.what for r in results] == [f"{name}, {num} image(s)" for num in (1, 3) for name in names]
    assert all(r.agrees for r in results)
    graph = onnx.load(out).graph
    assert not {node.op_type for node in graph.node} & {"Resize", "Upsample"}
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 14, 35)
    got = session.run(["patch_tokens", "cls_token"], {"images": images.numpy()})
    with torch.inference_mode():
        expected = read_weights(source).load_backbone()(images)
    torch.testing.assert_close(torch.from_numpy(got[0]), expected.patch_tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(got[1]), expected.cls_token, rtol=1e-4, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(facts["std"]) == [0.229, 0.224, 0.225]
    assert facts["input"].startswith("images [B, 3, 14, 35], float32")
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.onnx"]


def test_onnx_beyond_the_limit_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_MAX_BYTES_IN_ONNX", 1000)
    (tmp_path / "out.onnx").write_text("before")
    export_backbone(_save(tmp_path / "in.pth", layout="meta"), str(tmp_path / "out.onnx"), "onnx", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.onnx", "out.onnx.data"]
    assert os.path.getsize(tmp_path / "out.onnx.data") > 100_000
    run = EXPORTERS["onnx"].load(str(tmp_path / "out.onnx"))
    assert run(torch.zeros(1, 3, 28, 28))["cls_token"].shape == (1, 64)


@pytest.mark.parametrize("size", [(28, 28), (42, 14)])
def test_torch_export_runs_without_this_package(size: tuple[int, int], tmp_path: Path) -> None:
    source, out = _save(tmp_path / "in.pth", replace(SMALL, depth=1), "meta"), str(tmp_path / "out.pt2")
    results = export_backbone(source, out, "torch-export", img_size=size)
    assert [r.what for r in results if "1 image" in r.what] == ["cls_token, 1 image(s)", "patch_tokens, 1 image(s)"]
    extra = {"dinoengine.json": ""}
    program = torch.export.load(out, extra_files=extra)
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]
    output = program.module()(torch.randn(4, 3, *size))
    assert {name: tuple(value.shape) for name, value in output.items()} == {
        "cls_token": (4, 64),
        "patch_tokens": (4, size[0] * size[1] // 49, 64),
    }
    assert "mean" not in json.loads(extra["dinoengine.json"])  # Meta's files have no config
    with pytest.raises((RuntimeError, AssertionError), match=r"images"):
        program.module()(torch.randn(4, 3, 21, 21))


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((30, 28), r"30 x 28 is no multiple of the patch size 7.*--img-size 28 28"),
        ((0, 28), r"0 x 28.*--img-size 7 28"),
    ],
)
def test_a_size_that_no_patch_fits(size: tuple[int, int], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        export_backbone(_save(tmp_path / "in.pth"), str(tmp_path / "out"), "torch-export", img_size=size)
    assert os.listdir(tmp_path) == ["in.pth"]


def _fake(damage: object) -> Exporter:
    def write(model: object, images: torch.Tensor, path: str, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"x")
        write.model = model  # type: ignore[attr-defined]

    def load(path: str):  # type: ignore[no-untyped-def]
        return lambda images: damage(write.model(images))  # type: ignore[attr-defined, operator]

    return Exporter((), write, load)


def _shifted(output: Outputs) -> Outputs:
    return {**output, "patch_tokens": output["patch_tokens"].roll(1, dims=1)}


def _one_batch_only(output: Outputs) -> Outputs:
    return {name: value[:1] for name, value in output.items()}


def _unnamed(output: Outputs) -> Outputs:
    return {f"output_{i}": value for i, value in enumerate(output.values())}


@pytest.mark.parametrize("damage", [_shifted, _one_batch_only, _unnamed])
def test_a_file_that_computes_something_else_is_not_kept(
    damage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _save(tmp_path / "in.pth")
    (tmp_path / "out").write_text("before")
    monkeypatch.setitem(EXPORTERS, "fake", _fake(damage))
    with pytest.raises(CheckpointError, match=r"does not compute what the model does|gives output_0, output_1"):
        export_backbone(source, str(tmp_path / "out"), "fake", overwrite=True)
    assert (tmp_path / "out").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out"]


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    with pytest.raises(ValueError, match=r"needs onnxruntime: pip install 'dinoengine\[onnx\]'"):
        export_backbone(_save(tmp_path / "in.pth"), str(tmp_path / "out.onnx"), "onnx")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("export_model")
    source, out = _save(tmp_path / "in.pth"), str(tmp_path / "out.pt2")
    assert tool.main(["--to", "torch-export", source, out, "--img-size", "14"]) == 0
    assert "[B, 3, 14, 14] -> cls_token, register_tokens, patch_tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--to", "torch-export", source, out])
    assert stopped.value.code == 2
    assert "exists already; choose another name, or give --overwrite" in capsys.readouterr().err


def test_weights_beside_the_graph_are_neither_overwritten_nor_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = _save(tmp_path / "in.pth"), tmp_path / "out.onnx"

    def write(model: object, images: torch.Tensor, path: str, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"graph")
        write.model = model  # type: ignore[attr-defined]
        if is_large:
            Path(f"{path}.data").write_bytes(b"weights")

    fake = EXPORTERS["onnx"]._replace(write=write, load=lambda path: lambda images: write.model(images))  # type: ignore[attr-defined]
    monkeypatch.setitem(EXPORTERS, "onnx", fake)
    (tmp_path / "out.onnx.data").write_text("mine")
    is_large = True
    with pytest.raises(CheckpointError, match=r"out\.onnx\.data exists already; choose another name"):
        export_backbone(source, str(out), "onnx")
    assert (tmp_path / "out.onnx.data").read_text() == "mine"
    export_backbone(source, str(out), "onnx", overwrite=True)
    assert (tmp_path / "out.onnx.data").read_text() == "weights"
    is_large = False
    export_backbone(source, str(out), "onnx", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.onnx"]
