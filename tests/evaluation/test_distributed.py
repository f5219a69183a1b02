"""Evaluation on two processes gives what it gives on one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import (
    Extraction,
    FeatureStore,
    build_evaluator,
    extract_features,
    extract_pixels,
    extract_to_store,
    inference_on_dataset,
)
from dinoengine.modeling.backbone import VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch.feature_model import FeatureModel
from dinoengine.structures import BackboneOutput
from dinoengine.utils import comm

BANK = "synthetic:num_images=37:num_classes=6:size=16"
QUERIES = "synthetic:num_images=13:num_classes=6:size=16:seed=1"
ODD_SIZES = (13, 7, 1)  # with one image, the first process has nothing to do


class BrokenForLateImages(FeatureModel):
    """Returns NaN for all images of the second process only."""

    def forward(self, images: Tensor) -> BackboneOutput:
        output = super().forward(images)
        if dist.is_initialized() and dist.get_rank() == 1:
            output.cls_token = output.cls_token * float("nan")
        return output


def _cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS=0", "INPUT.TEST.RESIZE_PX=0", "INPUT.TEST.CROP_SIZE_PX=16"])
    cfg.merge_from_list(["TEST.IMS_PER_BATCH=8", "TEST.KNN.K=(1, 5, 100)", f"DATASETS.TRAIN={BANK}"])
    return cfg


def _model(kind: type[FeatureModel] = FeatureModel) -> FeatureModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=(16, 16), patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return kind(PixelNorm([0.5] * 3, [0.25] * 3), backbone).eval()


def _evaluate_everything() -> dict[str, Any]:
    cfg, model = _cfg(), _model()
    found: dict[str, Any] = {
        "knn": inference_on_dataset(model, build_test_loader(cfg, QUERIES), build_evaluator(cfg, QUERIES))
    }
    for size in ODD_SIZES:
        name = f"synthetic:num_images={size}:num_classes=5:size=16"
        for kind, features in {
            "cls": extract_features(model, build_test_loader(cfg, name)),
            "pixels": extract_pixels(build_test_loader(cfg, name)),
        }.items():
            found[f"{kind}_{size}"] = features.features
            found[f"labels_{kind}_{size}"] = features.labels
    return found


def _run_rank(rank: int, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = _evaluate_everything()
    extract_to_store(_model(), _cfg(), QUERIES, f"{folder}/store", Extraction(("cls", "patch")))
    try:
        extract_features(_model(BrokenForLateImages), build_test_loader(_cfg(), QUERIES))
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    comm.destroy_process_group()


@pytest.fixture(scope="module")
def folder_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(_run_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder_of_ranks: Path) -> list[dict[str, Any]]:
    return [torch.load(folder_of_ranks / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return _evaluate_everything()


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", ["cls", "pixels"])
def test_every_process_has_every_image_once_in_order(
    two_ranks: list[dict[str, Any]], one_process: dict[str, Any], rank: int, size: int, kind: str
) -> None:
    features = two_ranks[rank][f"{kind}_{size}"]
    assert features.shape[0] == size
    torch.testing.assert_close(features, one_process[f"{kind}_{size}"], rtol=1e-5, atol=1e-5)
    assert two_ranks[rank][f"labels_{kind}_{size}"].tolist() == [i % 5 for i in range(size)]


def test_both_processes_hold_the_same_bits(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    for size in ODD_SIZES:
        assert torch.equal(first[f"cls_{size}"], second[f"cls_{size}"])


def test_two_processes_extract_the_rows_of_one(folder_of_ranks: Path, tmp_path: Path) -> None:
    together = FeatureStore(str(folder_of_ranks / "store"))
    alone = extract_to_store(_model(), _cfg(), QUERIES, str(tmp_path / "store"), Extraction(("cls", "patch")))
    assert together.features["cls"].shape == (13, 16)
    for name in ("cls", "patch"):
        torch.testing.assert_close(
            torch.tensor(together.features[name]), torch.tensor(alone.features[name]), rtol=1e-5, atol=1e-5
        )
    assert together.names == alone.names
    assert together.meta["index_sha256"] == alone.meta["index_sha256"]


def test_knn_results_are_those_of_one_process(two_ranks: list[dict[str, Any]], one_process: dict[str, Any]) -> None:
    assert two_ranks[0]["knn"] == two_ranks[1]["knn"] == one_process["knn"]
    assert one_process["knn"]["knn"].keys() == {f"top{top}_k{k}" for top in (1, 5) for k in (1, 5, 100)}
    assert 0 < one_process["knn"]["knn"]["top1_k5"] < 100  # a comparison that could have failed


def test_broken_features_of_one_process_stop_all(two_ranks: list[dict[str, Any]]) -> None:
    messages = [rank["error"] for rank in two_ranks]
    assert messages[0] == messages[1]
    assert (
        "features of 7 of 13 images are not finite, e.g. synthetic[6], synthetic[7], synthetic[8], synthetic[9], synthetic[10]"
        in messages[0]
    )
