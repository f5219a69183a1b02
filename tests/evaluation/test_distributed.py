"""Evaluation on two processes gives what it gives on one."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dinoengine.checkpoint import Checkpointer
from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import build_test_loader
from dinoengine.engine.hooks import CollapseGuard
from dinoengine.engine.hooks.collapse_symptoms import Scales
from dinoengine.evaluation import (
    Extraction,
    FeatureStore,
    HeadGrid,
    LabelFreeEvaluator,
    LinearEvaluator,
    LinearHeads,
    build_evaluator,
    extract_features,
    extract_pixels,
    extract_to_store,
    features,
    inference_on_dataset,
)
from dinoengine.evaluation.linear_training import ProbeCheckpoint
from dinoengine.evaluation.records import FOLDER
from dinoengine.modeling.backbone import VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch.feature_model import FeatureModel, PrototypeHead
from dinoengine.structures import BackboneOutput
from dinoengine.utils import comm
from tests.engine.toys import IdleTrainer, ToyModel
from tests.masks import write_mask_folder
from tests.voc import draw_labels, write_voc_split

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


def _cfg(folder: str) -> CfgNode:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = folder
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS=0", "INPUT.TEST.RESIZE_PX=0", "INPUT.TEST.CROP_SIZE_PX=16"])
    cfg.merge_from_list(["TEST.LINEAR.NUM_LAST_BLOCKS=(1, 2)", "TEST.LINEAR.BASE_LRS=(0.01, 10.0)"])
    cfg.merge_from_list(["TEST.LINEAR.IMS_PER_BATCH=6", "TEST.LINEAR.ITERS=8", "TEST.LINEAR.EPOCHS=0"])
    cfg.merge_from_list(["TEST.LINEAR.CHECKPOINT_PERIOD=0", "TEST.LOGREG.NUM_C=20", "TEST.LOGREG.TOL=1e-4"])
    cfg.merge_from_list(["TEST.IMS_PER_BATCH=8", "TEST.KNN.K=(1, 5, 100)", f"DATASETS.TRAIN={BANK}"])
    return cfg


def _model(kind: type[FeatureModel] = FeatureModel) -> FeatureModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=(16, 16), patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return kind(PixelNorm([0.5] * 3, [0.25] * 3), backbone).eval()


def _evaluate_everything(folder: str) -> dict[str, Any]:
    cfg, model = _cfg(folder), _model()
    found: dict[str, Any] = {
        "knn": inference_on_dataset(model, build_test_loader(cfg, QUERIES), build_evaluator(cfg, QUERIES)),
        "probes": _probe(cfg, model),
    }
    model.prototype_head = PrototypeHead(lambda cls_tokens: cls_tokens.softmax(1), lambda: 1.0)
    for size in ODD_SIZES:
        name = f"synthetic:num_images={size}:num_classes=5:size=16"
        label_free = inference_on_dataset(model, build_test_loader(cfg, name), LabelFreeEvaluator((1, 50)))
        found[f"label_free_{size}"] = label_free["label_free"]
        for kind, rows in {
            "cls": extract_features(model, build_test_loader(cfg, name)),
            "pixels": extract_pixels(build_test_loader(cfg, name)),
        }.items():
            found[f"{kind}_{size}"] = rows.features
            found[f"labels_{kind}_{size}"] = rows.labels
    return found


def _probe(cfg: CfgNode, model: FeatureModel) -> dict[str, Any]:
    """The linear probe, live and from a cache, with its heads, and logistic regression."""
    found: dict[str, Any] = {}
    for name in ("linear", "cached", "logreg"):
        cfg.TEST.EVALUATORS = ("logreg" if name == "logreg" else "linear",)
        cfg.TEST.LINEAR.CACHED = name == "cached"
        evaluators = build_evaluator(cfg, QUERIES)
        found[name] = inference_on_dataset(model, build_test_loader(cfg, QUERIES), evaluators)
        (evaluator,) = evaluators.evaluators
        if isinstance(evaluator, LinearEvaluator):
            found[f"heads of {name}"] = [t.clone() for t in evaluator._heads.state_dict()["parameters"]]
    return found


def _evaluate_masks(folder: Path, train: str = "train", test: str = "test") -> dict[str, Any]:
    """Of 5 test images and 10 training images two processes have parts of different size; of "one" the first has none."""
    cfg, test = _cfg(str(folder)), f"masks:{folder / test}"
    cfg.DATASETS.TRAIN = (f"masks:{folder / train}",)
    cfg.merge_from_list(["INPUT.TEST.CROP_SIZE_PX=32", "TEST.EVALUATORS=('segmentation','dense_knn')"])
    cfg.merge_from_list(["TEST.SEGMENTATION.ITERS=20", "TEST.SEGMENTATION.IMS_PER_BATCH=4"])
    cfg.merge_from_list(["TEST.SEGMENTATION.BASE_LR=0.1", "TEST.SEGMENTATION.WARMUP_ITERS=2"])
    cfg.merge_from_list(["TEST.DENSE_KNN.NUM_PATCHES=60", "TEST.DENSE_KNN.K=3"])
    return inference_on_dataset(_model(), build_test_loader(cfg, test), build_evaluator(cfg, test))


def _evaluate_voc(folder: Path) -> dict[str, Any]:
    """Of 21 test images; 20 classes and 2 chains of C, that two processes share."""
    cfg, voc = _cfg(str(folder)), folder / "voc"
    cfg.DATASETS.TRAIN = (f"voc2007:{voc}:split=trainval",)
    cfg.merge_from_list(
        ["TEST.EVALUATORS=('logreg',)", "TEST.LOGREG.NUM_C=10", "TEST.LOGREG.C_LOG10_RANGE=(-4.0, 0.0)"]
    )
    test = f"voc2007:{voc}:split=test"
    return inference_on_dataset(_model(), build_test_loader(cfg, test), build_evaluator(cfg, test))


def _errors_of_the_first(rank: int, folder: Path) -> dict[str, str]:
    """What each process raises where the first alone touches files, and cannot."""
    if rank == 0:
        (folder / "file").write_text("no folder")
        (folder / FOLDER).mkdir(exist_ok=True)
        Path(ProbeCheckpoint(str(folder), {"broken": True}).path).write_bytes(b"no checkpoint")
    comm.synchronize()
    heads = LinearHeads(HeadGrid((0.1,), (1,), (False,)), 4, 3)
    calls = {
        "store": lambda: extract_to_store(_model(), _cfg(""), QUERIES, f"{folder}/file/store", Extraction()),
        "load": lambda: ProbeCheckpoint(str(folder), {"broken": True}).load(heads),
        "save": lambda: ProbeCheckpoint(f"{folder}/file", {}).save(heads, 1),
        "rollback": lambda: _guard_that_rolls_back(folder)._act({"uniform targets": "entropy"}),
    }
    errors = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def _guard_that_rolls_back(folder: Path) -> CollapseGuard:
    """Its last checkpoint, which rank 0 reads, is a broken file."""
    trainer = IdleTrainer()
    guard = CollapseGuard(Checkpointer(ToyModel(), str(folder)), Scales(8, 1.0, 8, 1), action="rollback")
    guard.trainer = trainer
    guard.before_train()
    if comm.is_main_process():
        (folder / "model_final.pth").write_bytes(b"no checkpoint")
    return guard


def _run_rank(rank: int, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    features._EXCHANGED_BYTES = 200  # a few rows at a time, as of a large set
    found = _evaluate_everything(folder)
    found["masks"] = _evaluate_masks(Path(folder))
    found["voc"] = _evaluate_voc(Path(folder))
    found["one test mask"] = _evaluate_masks(Path(folder), test="one")
    found["one training mask"] = _evaluate_masks(Path(folder), train="one", test="train")
    extract_to_store(_model(), _cfg(folder), QUERIES, f"{folder}/store", Extraction(("cls", "patch")))
    try:
        extract_features(_model(BrokenForLateImages), build_test_loader(_cfg(folder), QUERIES))
    except ValueError as error:
        found["error"] = str(error)
    found["errors of the first"] = _errors_of_the_first(rank, Path(folder))
    torch.save(found, f"{folder}/rank{rank}.pt")
    comm.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("two_ranks")
    write_mask_folder(folder / "train", 10)
    write_mask_folder(folder / "test", 5, first_seed=100)
    write_voc_split(folder / "voc", "trainval", draw_labels(40, seed=0))
    write_voc_split(folder / "voc", "test", draw_labels(21, seed=1), first=40)
    write_mask_folder(folder / "one", 1, first_seed=200)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    mp.spawn(_run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _evaluate_everything(str(tmp_path_factory.mktemp("one_process")))


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


@pytest.mark.usefixtures("two_ranks")
def test_two_processes_extract_the_rows_of_one(folder: Path, tmp_path: Path) -> None:
    together = FeatureStore(str(folder / "store"))
    alone = extract_to_store(
        _model(), _cfg(str(tmp_path)), QUERIES, str(tmp_path / "store"), Extraction(("cls", "patch"))
    )
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


@pytest.mark.parametrize("size", ODD_SIZES)
def test_label_free_results_are_those_of_one_process(
    two_ranks: list[dict[str, Any]], one_process: dict[str, Any], size: int
) -> None:
    expected = one_process[f"label_free_{size}"]
    assert two_ranks[0][f"label_free_{size}"] == pytest.approx(expected, rel=1e-5, nan_ok=size < 7)
    assert math.isnan(expected["alpha"]) == (size < 7)  # a line through fewer than three eigenvalues is none
    assert len(expected) == 10


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("masks", {}),
        ("one test mask", {"test": "one"}),
        ("one training mask", {"train": "one", "test": "train"}),
    ],
)
def test_segmentation_results_are_those_of_one_process(
    two_ranks: list[dict[str, Any]], folder: Path, name: str, sets: dict[str, str]
) -> None:
    one_process = _evaluate_masks(folder, **sets)
    assert two_ranks[0][name] == two_ranks[1][name]
    for task in ("segmentation", "dense_knn"):
        # Sums over two processes are rounded otherwise; a pixel of 4480 may change sides.
        assert two_ranks[0][name][task] == pytest.approx(one_process[task], abs=0.1)
        assert 10 < one_process[task]["miou"] < 100  # a comparison that could have failed


def test_multi_label_results_are_those_of_one_process(two_ranks: list[dict[str, Any]], folder: Path) -> None:
    one_process = _evaluate_voc(folder)
    assert two_ranks[0]["voc"] == two_ranks[1]["voc"]
    # Rounding of features differs with the batch, so two nearly equal scores may change places.
    assert two_ranks[0]["voc"]["logreg"] == pytest.approx(one_process["logreg"], abs=0.5)
    assert 10 < one_process["logreg"]["map"] < 90  # a comparison that could have failed


def test_broken_features_of_one_process_stop_all(two_ranks: list[dict[str, Any]]) -> None:
    messages = [rank["error"] for rank in two_ranks]
    assert messages[0] == messages[1]
    names = ", ".join(f"synthetic:seed=1[{i}]" for i in range(6, 11))
    assert f"features of 7 of 13 images are not finite, e.g. {names}" in messages[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("store", "ValueError: The features cannot be written to"),
        ("load", "ValueError: "),
        ("save", "NotADirectoryError: "),
        ("rollback", "CollapseError: "),
    ],
)
def test_what_the_first_process_alone_cannot_do_ends_all(
    two_ranks: list[dict[str, Any]], name: str, expected: str
) -> None:
    """The second gets a copy; it used to wait for the first until the collective timed out."""
    first, second = (rank["errors of the first"][name] for rank in two_ranks)
    assert second.startswith(expected)
    assert second == first


def test_probes_are_those_of_one_process(two_ranks: list[dict[str, Any]], one_process: dict[str, Any]) -> None:
    """The batch is global: gradients of half batches add up to that of the whole one."""
    first, second, alone = two_ranks[0]["probes"], two_ranks[1]["probes"], one_process["probes"]
    for name in ("linear", "cached", "logreg"):
        assert first[name] == second[name] == alone[name]
    for name in ("heads of linear", "heads of cached"):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(one, other) for one, other in zip(first[name], second[name], strict=True))
    assert not torch.equal(alone["heads of linear"][0], alone["heads of cached"][0])
