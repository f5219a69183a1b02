"""Every layout out and in again, against the libraries the files are for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint import convert as convert_module
from dinoengine.checkpoint.convert import convert, save_weights
from dinoengine.checkpoint.layouts import LAYOUTS, Hints, read_weights
from dinoengine.checkpoint.parity import Comparison
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS, WITHOUT_SCALE, random_entries, random_weights


def _save(weights: Weights, path: Path, to: str = "meta") -> str:
    save_weights(weights, str(path), to)
    return str(path)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ROUND_TRIPS = [
    ("meta", SMALL),
    ("meta", WITH_REGISTERS),
    ("meta", SWIGLU),
    ("meta-teacher", SMALL),
    ("huggingface", SMALL),
    ("huggingface", WITH_REGISTERS),
    ("huggingface", SWIGLU),
    ("timm", SMALL),
    ("timm", WITH_REGISTERS),
    ("timm", SWIGLU),
    ("cerebras", SMALL),
    ("dino", WITHOUT_SCALE),
    ("ibot", WITHOUT_SCALE),
    ("dinoengine", SMALL),
    ("dinoengine", WITH_REGISTERS),
]


@pytest.mark.parametrize(
    ("layout", "spec"), ROUND_TRIPS, ids=[f"{n}-{s.ffn}-{s.num_register_tokens}" for n, s in ROUND_TRIPS]
)
def test_out_and_in_again(layout: str, spec: BackboneSpec, tmp_path: Path) -> None:
    """``convert`` itself runs both sides; here: the entries, and that the layout is found by its keys."""
    source = _save(random_weights(spec), tmp_path / "source.pth")
    out = str(tmp_path / "out")
    results = convert(source, out, layout)
    assert results
    assert all(r.agrees for r in results if r.must_agree)
    read = read_weights(out)
    assert read.layout == layout
    assert (read.missing, read.unused) == ([], [])
    back = str(tmp_path / "back.pth")
    convert(out, back, "meta")
    expected, got = torch.load(source), torch.load(back)
    if layout in ("timm", "dino"):
        assert not got.pop("mask_token").any()
        expected.pop("mask_token")
    if layout == "timm" and spec.num_register_tokens:  # CLS carries its position there: the sum is what counts
        for entries in (expected, got):
            entries["cls_token"] = entries["cls_token"] + entries["pos_embed"][:, :1]
            entries["pos_embed"] = entries["pos_embed"][:, 1:]
    assert _equal(expected, got)


def test_heads_are_kept_where_the_layout_has_them(tmp_path: Path) -> None:
    source = _save(random_weights(heads=True), tmp_path / "teacher.pth", "meta-teacher")
    for layout in ("dinoengine", "cerebras"):
        results = convert(source, str(tmp_path / layout), layout)
        assert [r.what for r in results if "head" in r.what] == ["dino_head", "ibot_head"]
        convert(str(tmp_path / layout), str(tmp_path / f"{layout}-back.pth"), "meta-teacher")
        assert _equal(torch.load(source)["teacher"], torch.load(tmp_path / f"{layout}-back.pth")["teacher"])


@pytest.mark.parametrize("layout", ["meta", "huggingface", "timm", "dino"])
def test_heads_are_never_left_out_silently(layout: str, tmp_path: Path) -> None:
    spec = WITHOUT_SCALE if layout == "dino" else SMALL
    source = _save(random_weights(spec, heads=True), tmp_path / "teacher.pth", "meta-teacher")
    with pytest.raises(CheckpointError, match=r"no place for: dino_head(?s:.)*--allow 'dino_head\.\*'"):
        convert(source, str(tmp_path / "out"), layout)
    assert not (tmp_path / "out").exists()
    convert(source, str(tmp_path / "out"), layout, allow=["dino_head.*", "ibot_head.*"])


def test_a_layout_without_layer_scale_cannot_hold_it(tmp_path: Path) -> None:
    source = _save(random_weights(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="The dino layout cannot hold ViT/7.*: it has no LayerScale"):
        convert(source, str(tmp_path / "out"), "dino")


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_every_entry_is_accounted_for(change: str, tmp_path: Path) -> None:
    entries = random_weights().backbone
    if change == "missing":
        del entries["blocks.1.norm2.bias"]
    else:
        entries["blocks.1.norm9.bias"] = torch.zeros(1)
    torch.save(entries, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm[29]\.bias"):
        convert(str(tmp_path / "in.pth"), str(tmp_path / "out"), "timm")
    if change == "unknown":
        convert(str(tmp_path / "in.pth"), str(tmp_path / "out"), "timm", allow=["*norm9*"])


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_block_chunks_out_and_in(num_chunks: int, tmp_path: Path) -> None:
    source = _save(random_weights(), tmp_path / "in.pth")
    convert(source, str(tmp_path / "chunked.pth"), "meta-teacher", block_chunks=num_chunks)
    names = [n for n in torch.load(tmp_path / "chunked.pth")["teacher"] if n.endswith("ls1.gamma")]
    size = 3 // num_chunks
    assert names == [f"backbone.blocks.{i // size}.{i}.ls1.gamma" for i in range(3)]
    convert(str(tmp_path / "chunked.pth"), str(tmp_path / "back.pth"), "meta")
    assert _equal(torch.load(source), torch.load(tmp_path / "back.pth"))


def test_transformers_loads_the_folder_without_a_complaint(tmp_path: Path) -> None:
    from transformers import AutoModel

    for name, spec in (("plain", SMALL), ("registers", WITH_REGISTERS), ("swiglu", SWIGLU)):
        _save(random_weights(spec), tmp_path / name, "huggingface")
        model, info = AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (model.config.num_attention_heads, model.config.image_size) == (1, 28)


def test_timm_loads_the_file_by_its_path(tmp_path: Path) -> None:
    import timm

    published = replace(WITH_REGISTERS, embed_dim=384, num_heads=6, ffn_hidden=1536, patch_size=14, table_grid=(2, 2))
    weights = random_weights(published)
    path = _save(weights, tmp_path / "timm.pth", "timm")
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=3, img_size=28, checkpoint_path=path).eval()
    images = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(images)[:, 0], weights.load_backbone()(images).cls_token)


def test_a_model_of_transformers_comes_in(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7, num_labels=5
    )
    model = Dinov2ForImageClassification(config).eval()
    model.load_state_dict(random_entries(model))
    model.save_pretrained(tmp_path / "hf")
    weights = read_weights(str(tmp_path / "hf"))
    assert (weights.spec.num_heads, weights.missing, weights.unused) == (4, [], [])
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        output = weights.load_backbone()(images)
        features = torch.cat((output.cls_token, output.patch_tokens.mean(1)), dim=1)
        head = weights.parts["linear_head"]
        torch.testing.assert_close(
            features @ head["weight"].T + head["bias"], model(images).logits, rtol=1e-4, atol=1e-4
        )


def test_heads_of_another_width_must_be_told(tmp_path: Path) -> None:
    weights = random_weights(replace(SMALL, num_heads=4))
    source = _save(weights, tmp_path / "own.pth", "dinoengine")
    assert read_weights(source).spec.num_heads == 4
    convert(source, str(tmp_path / "meta.pth"), "meta")
    assert read_weights(str(tmp_path / "meta.pth")).spec.num_heads == 1  # what the file alone says
    told = read_weights(str(tmp_path / "meta.pth"), hints=Hints(num_heads=4))
    assert told.spec == weights.spec


def test_rectangular_tables(tmp_path: Path) -> None:
    weights = random_weights(replace(SMALL, table_grid=(2, 5)))
    source = _save(weights, tmp_path / "own.pth", "dinoengine")
    assert read_weights(source).spec.table_grid == (2, 5)
    convert(source, str(tmp_path / "meta.pth"), "meta")
    with pytest.raises(CheckpointError, match=r"10 patches, which is no square; give its rows and columns"):
        read_weights(str(tmp_path / "meta.pth"))
    assert read_weights(str(tmp_path / "meta.pth"), hints=Hints(table_grid=(2, 5))).spec == weights.spec
    with pytest.raises(CheckpointError, match="position table that is not square"):
        convert(source, str(tmp_path / "hf"), "huggingface")


def test_interpolation_that_differs_is_said_and_is_no_failure(tmp_path: Path) -> None:
    results = save_weights(random_weights(), str(tmp_path / "hf"), "huggingface")
    assert [(r.agrees, r.must_agree) for r in results] == [(True, True), (False, False), (True, True)]
    assert "as the layouts interpolate otherwise" in results[1].line()
    results = save_weights(random_weights(WITH_REGISTERS), str(tmp_path / "hf4"), "huggingface")
    assert [r.what for r in results[2:]] == ["mask_token"]
    assert [(r.agrees, r.must_agree) for r in results] == [(True, True)] * 3


def test_a_result_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.pth").write_text("before")
    monkeypatch.setattr(convert_module, "compare_files", lambda *_: [Comparison("it", float("nan"), 1.0)])
    with pytest.raises(CheckpointError, match="does not compute what the source does, so nothing was written"):
        save_weights(random_weights(), str(tmp_path / "out.pth"), "meta", overwrite=True)
    assert (tmp_path / "out.pth").read_text() == "before"
    assert os.listdir(tmp_path) == ["out.pth"]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = _save(random_weights(), tmp_path / "out.pth")
    with pytest.raises(CheckpointError, match=r"exists already; choose another name, or give --overwrite"):
        save_weights(random_weights(), path, "timm")
    save_weights(random_weights(), path, "timm", overwrite=True)
    assert read_weights(path).layout == "timm"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_foreign_file_is_refused_by_every_layout(name: str, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth"):
        read_weights(str(tmp_path / "resnet.pth"), name)


def test_a_foreign_file_names_what_it_has_and_what_is_known(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(
        CheckpointError, match=r"is of no layout known here; it has fc\.\{weight, bias\}\. Known: dinoengine:"
    ):
        read_weights(str(tmp_path / "resnet.pth"))


def test_a_shard_of_fsdp_says_what_to_take(tmp_path: Path) -> None:
    torch.save(
        {"model": {"teacher.backbone._flat_param": torch.zeros(9)}, "iteration": 3}, tmp_path / "model.rank_0.pth"
    )
    with pytest.raises(CheckpointError, match=r"shard of an FSDP training(?s:.)*teacher_checkpoint\.pth"):
        read_weights(str(tmp_path / "model.rank_0.pth"))


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    save_weights(random_weights(), str(tmp_path / "hf"), "huggingface")
    save_weights(random_weights(WITH_REGISTERS), str(tmp_path / "hf"), "huggingface", overwrite=True)
    assert read_weights(str(tmp_path / "hf")).spec.num_register_tokens == 4
    (tmp_path / "hf" / "thesis.tex").write_text("two years of work")
    for layout in ("huggingface", "meta"):
        with pytest.raises(CheckpointError, match=r"folder with other files in it \(thesis\.tex\)"):
            save_weights(random_weights(), str(tmp_path / "hf"), layout, overwrite=True)


def test_the_wrong_layout_says_what_the_file_has(tmp_path: Path) -> None:
    path = _save(random_weights(), tmp_path / "meta.pth")
    with pytest.raises(CheckpointError, match=r"no entry of a backbone of the huggingface layout; it has cls_token, "):
        read_weights(path, "huggingface")


@pytest.mark.parametrize(
    ("spec", "flag"),
    [(replace(SMALL, num_heads=4), "--num-heads 4"), (replace(SMALL, table_grid=(2, 8)), "--grid 2 8")],
)
def test_what_a_layout_cannot_state_is_said_when_it_is_written(
    spec: BackboneSpec, flag: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_weights(random_weights(spec), str(tmp_path / "m.pth"), "meta")
    assert f"is read, give {flag}" in caplog.text
    caplog.clear()
    save_weights(random_weights(spec), str(tmp_path / "own.pth"), "dinoengine")
    save_weights(random_weights(), str(tmp_path / "plain.pth"), "meta")
    assert "cannot state" not in caplog.text


def test_hugging_face_weights_need_their_config(tmp_path: Path) -> None:
    _save(random_weights(), tmp_path / "hf", "huggingface")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json beside it, which states the attention heads"):
        read_weights(str(tmp_path / "hf"))
    assert read_weights(str(tmp_path / "hf"), hints=Hints(num_heads=1)).spec == replace(SMALL, interpolate_offset=0.0)


def test_a_linear_head_alone_names_the_tool_for_it(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(10, 128), "bias": torch.zeros(10)}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"linear head alone.*convert_to_classifier\.py --linear-head"):
        read_weights(str(tmp_path / "head.pth"))


def test_the_source_is_never_its_own_target(tmp_path: Path) -> None:
    path = _save(random_weights(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="IN and OUT are the same file"):
        convert(path, path, "timm", overwrite=True)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"o\.pth cannot be written: .*choose another place"):
        save_weights(random_weights(), str(tmp_path / "file" / "o.pth"), "meta")
    with pytest.raises(CheckpointError, match="is a file, and the huggingface layout is a folder"):
        save_weights(random_weights(), str(tmp_path / "file"), "huggingface", overwrite=True)


@pytest.mark.parametrize(
    ("layout", "spec"), [("huggingface", SMALL), ("huggingface", SWIGLU), ("timm", SMALL), ("cerebras", SMALL)]
)
def test_half_precision_is_compared_in_full_and_stays_half(layout: str, spec: BackboneSpec, tmp_path: Path) -> None:
    entries = {name: value.half() for name, value in random_weights(spec).backbone.items()}
    torch.save(entries, tmp_path / "in.pth")
    results = convert(str(tmp_path / "in.pth"), str(tmp_path / "out"), layout)
    assert results[0].agrees
    read = read_weights(str(tmp_path / "out"))
    assert {value.dtype for value in read.backbone.values()} == {torch.float16}


def _full_weights() -> Weights:
    """Teacher and student with heads, and centres."""
    weights = random_weights(heads=True)
    weights.parts["student.backbone"] = random_entries(weights.spec.build(), seed=5)
    for name in ("dino_head", "ibot_head"):
        weights.parts[f"student.{name}"] = {k: v + 0.1 for k, v in weights.parts[name].items()}
    weights.parts["centers"] = {"dino": torch.randn(1, 12), "ibot": torch.randn(1, 13)}
    return weights


@pytest.mark.parametrize(
    ("layout", "entry"),
    [
        ("cerebras", "image_model_trunks.model.1.encoder.transformer_encoder.norm.weight"),
        ("cerebras", "image_model_trunks.model.0.embedding_layer.mask_token"),
        ("cerebras", "heads.model.1.mlp.0.weight"),
        ("cerebras", "heads.model.3.last_layer.weight_g"),
        ("cerebras", "losses.model.1.center"),
        ("dinoengine", "student.backbone.blocks.2.mlp.fc2.weight"),
        ("dinoengine", "head.weight"),
        ("dinoengine", "head.bias"),
    ],
)
def test_the_check_sees_damage_in_every_part(
    layout: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if entry.startswith("head."):
        weights = random_weights(linear_head={"weight": torch.randn(5, 128), "bias": torch.randn(5)})
    else:
        weights = _full_weights()
    write = type(LAYOUTS[layout]).write

    def damaged(self, weights):  # type: ignore[no-untyped-def]
        content, lost = write(self, weights)
        content.data["model"][entry] = torch.zeros_like(content.data["model"][entry])
        return content, lost

    monkeypatch.setattr(type(LAYOUTS[layout]), "write", damaged)
    with pytest.raises(CheckpointError, match="does not compute what the source does, so nothing was written"):
        save_weights(weights, str(tmp_path / "out.pth"), layout)
    assert os.listdir(tmp_path) == []


def test_the_check_sees_a_part_that_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = type(LAYOUTS["cerebras"]).write

    def without_student(self, weights):  # type: ignore[no-untyped-def]
        content, lost = write(self, weights)
        model = {n: v for n, v in content.data["model"].items() if not n.startswith("image_model_trunks.model.1.")}
        return replace(content, data={"model": model}), lost

    monkeypatch.setattr(type(LAYOUTS["cerebras"]), "write", without_student)
    with pytest.raises(CheckpointError, match=r"lacks student\.backbone"):
        save_weights(_full_weights(), str(tmp_path / "out.mdl"), "cerebras")


@pytest.mark.parametrize("source", ["hf/model.safetensors", "hf"])
def test_the_folder_that_holds_the_source_is_never_replaced(source: str, tmp_path: Path) -> None:
    _save(random_weights(), tmp_path / "hf", "huggingface")
    for to in ("timm", "huggingface"):
        with pytest.raises(CheckpointError, match=r"IN (lies in|and) OUT"):
            convert(str(tmp_path / source), str(tmp_path / "hf"), to, overwrite=True)
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("layout", ["dinoengine", "meta-teacher", "cerebras"])
def test_a_nested_layout_is_no_safetensors_and_that_is_said_first(layout: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"The {layout} layout is nested, which safetensors cannot hold.*\.pth"):
        convert(str(tmp_path / "not-even-read"), str(tmp_path / "out.safetensors"), layout)


def test_entries_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weights = random_weights(heads=True)
    weights.backbone["blocks.1.norm1.bias"][3] = float("nan")
    weights.parts["ibot_head"]["mlp.0.bias"][0] = float("inf")
    torch.save(LAYOUTS["meta-teacher"].write(weights)[0].data, tmp_path / "in.pth")
    with pytest.raises(
        CheckpointError, match=r"2 with values that are not finite: blocks\.1\.norm1\.bias, ibot_head\.mlp\.0\.bias"
    ):
        convert(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "dinoengine")


def test_keys_that_timm_has_too_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(random_weights(WITHOUT_SCALE), tmp_path / "teacher.pth", "meta-teacher")
    path = str(tmp_path / "dino.pth")
    convert(str(tmp_path / "teacher.pth"), path, "dino", allow=["mask_token"])
    caplog.clear()
    assert read_weights(path).layout == "dino"
    assert "a timm ViT without LayerScale has the same keys" in caplog.text
    assert "--from timm" in caplog.text
    caplog.clear()
    assert read_weights(path, "timm").spec.interpolate_antialias
    read_weights(path, "dino")
    assert caplog.text == ""
