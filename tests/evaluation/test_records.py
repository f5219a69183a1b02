from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.evaluation import differences, make_record, save_record, weights_sha256
from dinoengine.modeling.backbone import VisionTransformer


def _record(cfg: CfgNode, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "dataset": "folder:/data/my val",
        "model": nn.Linear(2, 2),
        "num_images": 10,
        "protocol": {"knn": {"k": [10, 20], "temperature": 0.07}},
        "results": {"knn": {"top1_k10": 50.0}},
        **changes,
    }
    return make_record(cfg, settings.pop("dataset"), **settings)


def test_the_hash_is_of_names_shapes_types_and_values() -> None:
    model = nn.Linear(3, 2)
    same = copy.deepcopy(model)
    assert weights_sha256(model) == weights_sha256(same)
    assert weights_sha256(model) != weights_sha256(copy.deepcopy(model).double())
    assert weights_sha256(model) != weights_sha256(nn.Sequential(model))
    with torch.no_grad():
        same.weight[1, 2] += 1e-6
    assert weights_sha256(model) != weights_sha256(same)
    flat, square = nn.Linear(1, 1), nn.Linear(1, 1)
    flat.weight, square.weight = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))
    flat.bias = square.bias
    assert weights_sha256(flat) != weights_sha256(square)
    assert len(weights_sha256(nn.Linear(1, 1).to(torch.bfloat16))) == 64


def test_a_record_is_a_json_file_that_says_of_what_it_is(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    record = _record(tiny_cfg, iteration=199)
    path = Path(save_record(record, str(tmp_path)))
    assert path.parent == tmp_path / "eval"
    assert path.name.startswith("iter_0000199-folder_data_my_val-")
    assert json.loads(path.read_text()) == record
    assert record["weights"]["iteration"] == 199
    assert (
        record["preprocessing"]["crop_size_px"] == [*tiny_cfg.INPUT.TEST.CROP_SIZE_PX] * 2
    )  # (16,) and (16, 16) are the same


def test_weights_from_a_file_are_named_and_each_protocol_keeps_its_file(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.MODEL.WEIGHTS = "w.pth"
    model = nn.Linear(2, 2)
    paths = {
        save_record(_record(tiny_cfg, model=model, **changes), str(tmp_path))
        for changes in ({}, {"protocol": {"knn": {"k": [5]}}}, {"dataset": "digits"}, {"results": {}})
    }
    assert len(paths) == 3
    record = _record(tiny_cfg, model=model)
    assert record["weights"]["file"] == "w.pth"
    assert record["weights"]["iteration"] is None
    assert f"weights_{weights_sha256(model)[:8]}-" in next(iter(paths))


def test_what_makes_two_results_incomparable_is_named(tiny_cfg: CfgNode) -> None:
    first = _record(tiny_cfg)
    assert differences(first, _record(tiny_cfg, results={"knn": {"top1_k10": 90.0}}, iteration=3)) == []
    protocol = {"knn": {"k": [10, 20], "temperature": 0.1}, "linear": {"epochs": 1}}
    assert differences(first, _record(tiny_cfg, protocol=protocol, num_images=11)) == [
        "num_images: 10 and 11",
        "protocol.knn.temperature: 0.07 and 0.1",
        "linear: only in the second",
    ]
    other = tiny_cfg.clone()
    other.INPUT.TEST.CROP_SIZE_PX = (16,)
    assert [d.split(":")[0] for d in differences(first, _record(other))] == ["preprocessing.crop_size_px"]


def test_the_hash_knows_what_makes_other_features_of_the_same_tensors() -> None:
    def model(**settings: Any) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": (8, 8)}
        return VisionTransformer(**{**sizes, **settings})

    usual = weights_sha256(model())
    assert weights_sha256(model()) == usual
    for change in ({"num_heads": 4}, {"interpolate_antialias": True}, {"interpolate_offset": 0.0}):
        assert weights_sha256(model(**change)) != usual
    assert weights_sha256(model(drop_path_rate=0.5)) == usual  # training only


def test_training_sets_are_part_of_the_protocol(tiny_cfg: CfgNode) -> None:
    tiny_cfg.DATASETS.TRAIN = ("folder:/a",)
    first = _record(tiny_cfg)
    assert first["protocol"]["knn"]["train"] == ["folder:/a"]
    tiny_cfg.TEST.KNN.TRAIN = ("folder:/b",)
    assert [d.split(":")[0] for d in differences(first, _record(tiny_cfg))] == ["protocol.knn.train"]


def test_datasets_with_alike_names_keep_their_files(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    paths = {
        save_record(_record(tiny_cfg, model=model, dataset=d), str(tmp_path)) for d in ("folder:/a/b", "folder:/a_b")
    }
    assert len(paths) == 2
