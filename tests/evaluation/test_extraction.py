from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    Extraction,
    FeatureStore,
    extract_features,
    extract_to_store,
    feature_store,
    weights_sha256,
)
from dinoengine.evaluation import extraction as extraction_module
from dinoengine.modeling import FeatureModel, VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.structures import BackboneOutput

DATA = "synthetic:num_images=11:num_classes=3:size=16"


def _model(registers: int = 0) -> FeatureModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        img_size=(16, 16), patch_size=8, embed_dim=8, depth=3, num_heads=2, num_register_tokens=registers
    )
    return FeatureModel(PixelNorm([0.5] * 3, [0.25] * 3), backbone).eval()


def _cfg(batch_size: int = 4, crop: int = 16) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS=0", "INPUT.TEST.RESIZE_PX=0", f"INPUT.TEST.CROP_SIZE_PX={crop}"])
    cfg.merge_from_list([f"TEST.IMS_PER_BATCH={batch_size}"])
    return cfg


def _images() -> Tensor:
    return torch.cat([batch.images for batch in build_test_loader(_cfg(), DATA)])


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the run stop after so many batches, as a kill would."""
    write = extraction_module._write_batch

    def arm(number: int) -> None:
        left = [number]

        def stop(*args: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(*args)

        monkeypatch.setattr(extraction_module, "_write_batch", stop)

    return arm


# --- rows --------------------------------------------------------------------------------------------------------


def test_cls_rows_are_those_of_the_evaluators(tmp_path: Path) -> None:
    store = extract_to_store(_model(), _cfg(), DATA, str(tmp_path / "store"), Extraction())
    expected = extract_features(_model(), build_test_loader(_cfg(5), DATA))
    assert isinstance(store.features["cls"], np.memmap)
    torch.testing.assert_close(torch.tensor(store.features["cls"]), expected.features)
    assert store.labels is not None
    assert store.labels.tolist() == [i % 3 for i in range(11)]
    assert store.names == [f"synthetic:seed=0[{i}]" for i in range(11)]
    assert len(store) == 11


def test_every_kind_of_token_of_the_last_blocks_side_by_side(tmp_path: Path) -> None:
    model = _model(registers=2)
    what = Extraction(("cls", "mean_patch", "patch", "register"), num_last_blocks=2)
    store = extract_to_store(model, _cfg(), DATA, str(tmp_path / "store"), what)
    shapes = {name: array.shape for name, array in store.features.items()}
    assert shapes == {"cls": (11, 16), "mean_patch": (11, 16), "patch": (11, 4, 16), "register": (11, 2, 16)}
    with torch.no_grad():
        early, late = model.forward_last_blocks(_images(), 2)
    for block, half in ((early, slice(0, 8)), (late, slice(8, 16))):
        for name, expected in {
            "cls": block.cls_token,
            "mean_patch": block.patch_tokens.mean(1),
            "patch": block.patch_tokens,
            "register": block.register_tokens,
        }.items():
            found = torch.tensor(store.features[name])[..., half]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_normalized_rows_have_length_1_and_the_same_direction(tmp_path: Path) -> None:
    plain = extract_to_store(_model(), _cfg(), DATA, str(tmp_path / "a"), Extraction(("cls", "patch"), 2))
    unit = extract_to_store(
        _model(), _cfg(), DATA, str(tmp_path / "b"), Extraction(("cls", "patch"), 2, normalize=True)
    )
    for name in ("cls", "patch"):
        lengths = np.linalg.norm(plain.features[name], axis=-1, keepdims=True)
        np.testing.assert_allclose(unit.features[name], plain.features[name] / lengths, rtol=1e-4, atol=1e-6)


def test_half_arrays_are_rounded_and_half_as_large(tmp_path: Path) -> None:
    exact = extract_to_store(_model(), _cfg(), DATA, str(tmp_path / "a"), Extraction())
    half = extract_to_store(_model(), _cfg(), DATA, str(tmp_path / "b"), Extraction(dtype="float16"))
    assert half.features["cls"].dtype == np.float16
    np.testing.assert_array_equal(half.features["cls"], exact.features["cls"].astype(np.float16))


def test_a_set_without_labels(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (20, 18), (i * 80, 0, 0)).save(tmp_path / f"{i}.png")
    store = extract_to_store(_model(), _cfg(), f"folder:{tmp_path}", str(tmp_path / "store"), Extraction())
    assert store.labels is None
    assert [Path(name).name for name in store.names] == ["0.png", "1.png", "2.png"]


def test_meta_says_what_the_features_are(tmp_path: Path) -> None:
    model = _model()
    extract_to_store(model, _cfg(), DATA, str(tmp_path / "store"), Extraction(("cls", "patch")), weights_file="w.pth")
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert meta["weights_sha256"] == weights_sha256(model)
    assert meta["weights_file"] == "w.pth"
    assert (meta["dataset"], meta["num_images"]) == (DATA, 11)
    assert meta["preprocessing"]["crop_size_px"] == [16, 16]
    assert meta["arrays"]["patch"] == {"shape": [11, 4, 8], "dtype": "float32"}
    assert len(meta["class_names"]) == 3


# --- interruption ------------------------------------------------------------------------------------------------


def test_an_interrupted_run_is_no_store_and_goes_on_where_it_was(tmp_path: Path, killed_after: Any) -> None:
    path = str(tmp_path / "store")
    killed_after(2)
    with pytest.raises(KeyboardInterrupt):
        extract_to_store(_model(), _cfg(batch_size=3), DATA, path, Extraction())
    with pytest.raises(FileNotFoundError, match=r"are not finished; run the extraction again"):
        FeatureStore(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.unfinished"]
    killed_after(2)  # 5 images are left: two batches of 4 and 1
    store = extract_to_store(_model(), _cfg(batch_size=4), DATA, path, Extraction())
    torch.testing.assert_close(
        torch.tensor(store.features["cls"]), extract_features(_model(), build_test_loader(_cfg(), DATA)).features
    )
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["cls.npy", "index.jsonl", "meta.json"]
    killed_after(0)
    assert len(extract_to_store(_model(), _cfg(), DATA, path, Extraction())) == 11  # complete: nothing is computed


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    "change, difference",
    [
        ({"extraction": Extraction(normalize=True)}, "extraction.normalize: False and True"),
        ({"dataset": DATA + ":seed=1"}, f"dataset: {DATA} and {DATA}:seed=1"),
        ({"cfg": _cfg(crop=8)}, "preprocessing.crop_size_px: [16, 16] and [8, 8]"),
        ({"cfg": _cfg(batch_size=2)}, ""),
    ],
)
def test_other_settings_are_refused_and_named(
    change: dict[str, Any], difference: str, is_finished: bool, tmp_path: Path, killed_after: Any
) -> None:
    usual: dict[str, Any] = {"model": _model(), "cfg": _cfg(), "dataset": DATA, "extraction": Extraction()}
    path = str(tmp_path / "store")
    if is_finished:
        extract_to_store(path=path, **usual)
    else:
        killed_after(1)
        with pytest.raises(KeyboardInterrupt):
            extract_to_store(path=path, **usual)
        killed_after(9)
    if not difference:
        extract_to_store(path=path, **{**usual, **change})
        return
    with pytest.raises(ValueError, match=rf"other settings \(there, and now\):(\n.*)*\n  {re.escape(difference)}\n"):
        extract_to_store(path=path, **{**usual, **change})
    assert len(extract_to_store(path=path, **{**usual, **change}, overwrite=True)) == 11


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    extract_to_store(_model(), _cfg(), DATA, path, Extraction())
    other = _model()
    with torch.no_grad():
        other.backbone.norm.bias[0] += 1  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"weights_sha256: \w{64} and \w{64}\nName another place, or replace them"):
        extract_to_store(other, _cfg(), DATA, path, Extraction())


# --- bad input ---------------------------------------------------------------------------------------------------


class _NanForSome(FeatureModel):
    def forward_last_blocks(self, images: Tensor, num_blocks: int) -> list[BackboneOutput]:
        outputs = super().forward_last_blocks(images, num_blocks)
        if len(images) == 3:  # the last batch of 4 + 4 + 3
            outputs[-1].cls_token[1] = float("nan")
        return outputs


def test_features_that_are_not_finite_name_their_images_and_the_rest_is_kept(tmp_path: Path) -> None:
    good = _model()
    bad = _NanForSome(good.pixel_norm, good.backbone)  # type: ignore[arg-type]
    path = str(tmp_path / "store")
    with pytest.raises(ValueError, match=r"features of 1 of 3 images are not finite, e.g. synthetic:seed=0\[9\]\."):
        extract_to_store(bad, _cfg(), DATA, path, Extraction())
    assert np.load(tmp_path / "store.unfinished" / "done.npy").tolist() == [True] * 8 + [False] * 3


def test_features_beyond_float16_are_named(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.backbone.norm.bias += 1e5  # type: ignore[union-attr, operator]
    with pytest.raises(
        ValueError,
        match=r"float16 features of 4 of 4 .* e.g. synthetic:seed=0\[0\].* too large for float16; .*normalize",
    ):
        extract_to_store(model, _cfg(), DATA, str(tmp_path / "a"), Extraction(dtype="float16"))
    extract_to_store(model, _cfg(), DATA, str(tmp_path / "b"), Extraction(dtype="float16", normalize=True))


@pytest.mark.parametrize("tokens", [(), ("cls", "cls"), ("CLS",)])
def test_tokens_are_known_and_given_once(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"Tokens are some of cls, mean_patch, patch, register, each once; got"):
        Extraction(tokens)
    with pytest.raises(ValueError, match=r"one of float32, float16; got 'int8'"):
        Extraction(dtype="int8")


def test_what_the_backbone_cannot_give(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    with pytest.raises(ValueError, match=r"no register tokens; leave 'register' out"):
        extract_to_store(_model(), _cfg(), DATA, path, Extraction(("register",)))
    with pytest.raises(ValueError, match=r"crop of 12 x 12 pixels is no multiple of the patch of 8"):
        extract_to_store(_model(), _cfg(crop=12), DATA, path, Extraction())
    with pytest.raises(ValueError, match=r"The backbone has 3 blocks; got the last 9"):
        extract_to_store(_model(), _cfg(), DATA, path, Extraction(num_last_blocks=9))
    assert list(tmp_path.iterdir()) == []


def test_what_an_interrupted_run_leaves_behind_is_said(
    tmp_path: Path, killed_after: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "store")
    killed_after(1)
    with pytest.raises(KeyboardInterrupt):
        extract_to_store(_model(), _cfg(), DATA, path, Extraction())
    assert any(f"Not complete: {path}.unfinished keeps the rows" in m and "same command" in m for m in caplog.messages)
    caplog.clear()
    killed_after(9)
    extract_to_store(_model(), _cfg(), DATA, path, Extraction())
    assert "Not complete" not in caplog.text


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    """A file where a folder should be; permissions do not stop everyone."""
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "store")
    with pytest.raises(
        ValueError, match=rf"cannot be written to {path}: Not a directory .*Name a place in a folder that"
    ):
        extract_to_store(_model(), _cfg(), DATA, path, Extraction())


def test_a_finished_store_gets_the_parquet_index_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "store")
    extract_to_store(_model(), _cfg(), DATA, path, Extraction())
    written: list[tuple[int, str]] = []
    monkeypatch.setattr(extraction_module, "require_pyarrow", lambda: None)
    monkeypatch.setattr(feature_store, "_write_parquet", lambda rows, folder: written.append((len(rows), folder)))
    extract_to_store(_model(), _cfg(), DATA, path, Extraction())
    assert written == []
    extract_to_store(_model(), _cfg(), DATA, path, Extraction(), parquet=True)
    assert written == [(11, path)]
    (tmp_path / "store" / "index.parquet").write_text("")
    extract_to_store(_model(), _cfg(), DATA, path, Extraction(), parquet=True)
    assert written == [(11, path)]
