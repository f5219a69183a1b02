from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import build_dataset, build_test_loader
from dinoengine.evaluation import inference_on_dataset, labels_by_name, match_label_sets, shared_images
from dinoengine.evaluation.knn import build_knn_evaluator
from dinoengine.evaluation.label_sets import training_strings
from dinoengine.structures import BackboneOutput


def _folder(root: Path, images: dict[str, int]) -> str:
    """A dataset string of a folder with this many images per class; cats are dark, foxes bright."""
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            grey = {"cat": 10, "dog": 120, "fox": 240}[name] + i
            Image.fromarray(np.full((8, 8), grey, np.uint8)).save(root / name / f"{i}.png")
    return f"folder:{root}"


def _match(cfg: CfgNode, train: str, test: str) -> list[int]:
    return match_label_sets(cfg, "knn", (train,), test, build_test_loader).train_labels


def test_classes_meet_by_name_not_by_number(caplog: pytest.LogCaptureFixture) -> None:
    assert labels_by_name(["cat", "dog", "fox"], ["cat", "fox"]) == [0, 2, 1]
    assert labels_by_name(["a", "b"], ["a", "b"]) == [0, 1]
    assert caplog.messages == []
    assert labels_by_name(["b"], ["a", "b"]) == [1]
    assert caplog.messages == ["No training image has the class(es) a of the test set."]


def test_no_class_in_common_is_an_error_with_both_lists() -> None:
    with pytest.raises(
        ValueError, match=r"classes cat, dog\) and the test set \(classes 0, 1\) have no class in common"
    ):
        labels_by_name(["cat", "dog"], ["0", "1"])


def test_a_test_folder_that_lacks_a_class_is_judged_right(tmp_path: Path, tiny_cfg: CfgNode) -> None:
    """Perfect features: every image is one grey value, the same in train and test for a class."""
    train = _folder(tmp_path / "train", {"cat": 3, "dog": 3, "fox": 3})
    val = _folder(tmp_path / "val", {"cat": 3, "fox": 3})
    tiny_cfg.merge_from_list(["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", (0.5,), "MODEL.PIXEL_STD", (0.5,)])
    tiny_cfg.merge_from_list(["TEST.KNN.TRAIN", (train,), "TEST.KNN.K", (3,)])
    tiny_cfg.merge_from_list(["INPUT.TEST.RESIZE_PX", 8, "INPUT.TEST.CROP_SIZE_PX", (8,)])
    evaluator = build_knn_evaluator(tiny_cfg, val, build_test_loader)
    results = inference_on_dataset(BrightnessModel(), build_test_loader(tiny_cfg, val), evaluator)
    assert results == {"knn": {"top1_k3": 100.0}}


class BrightnessModel(torch.nn.Module):
    """Direction of the feature = brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor) -> BackboneOutput:
        angle = images.float().mean(dim=(1, 2, 3)) / 255 * self.scale
        cls_token = torch.stack((angle.cos(), angle.sin()), dim=1)
        empty = cls_token.new_zeros(len(images), 0, 2)
        return BackboneOutput(cls_token=cls_token, register_tokens=empty, patch_tokens=empty, grid=(0, 0))


def test_class_names_cover_what_only_the_training_set_has(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    train = _folder(tmp_path / "train", {"cat": 2, "dog": 2, "fox": 2})
    test = _folder(tmp_path / "test", {"cat": 1, "fox": 1})
    sets = match_label_sets(tiny_cfg, "knn", (train,), test, build_test_loader)
    assert sets.class_names == ["cat", "fox", "dog"]
    assert [sets.class_names[label] for label in sets.train_labels] == ["cat", "dog", "fox"]
    assert sets.num_classes == 3
    assert sets.train_class_of == [0, 2, 1]  # cat, fox, dog are 0, 2, 1 in the training set
    other_way = match_label_sets(tiny_cfg, "knn", (test,), train, build_test_loader)
    assert other_way.train_class_of == [0, -1, 1]


def test_an_evaluator_without_training_set_of_its_own_takes_that_of_the_run(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    train, test = _folder(tmp_path / "train", {"cat": 2}), _folder(tmp_path / "test", {"cat": 1})
    tiny_cfg.DATASETS.TRAIN = (train,)
    assert match_label_sets(tiny_cfg, "linear", (), test, build_test_loader).train_strings == (train,)
    tiny_cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"'linear' needs labels.*none is named.*TEST\.LINEAR\.TRAIN"):
        match_label_sets(tiny_cfg, "linear", (), test, build_test_loader)


def test_a_test_set_may_have_a_training_set_of_its_own(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["DATASETS.TRAIN", ("run",), "DATASETS.TEST", ("a", "b")])
    assert training_strings(tiny_cfg, (), "b") == ("run",)
    tiny_cfg.TEST.TRAIN_PER_TEST = ("train of a", "train of b")
    assert training_strings(tiny_cfg, (), "b") == ("train of b",)
    assert training_strings(tiny_cfg, (), "another") == ("run",)
    assert training_strings(tiny_cfg, ("x", "y"), "b") == ("x", "y")


def test_another_set_than_the_test_set_is_called_by_its_name(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    train, loose = _folder(tmp_path / "train", {"cat": 2}), _folder(tmp_path / "loose", {"cat": 1})
    (tmp_path / "loose" / "cat" / "0.png").rename(tmp_path / "loose" / "0.png")
    with pytest.raises(ValueError, match=r"the validation set \('folder:.*/loose',\) has none"):
        match_label_sets(tiny_cfg, "linear", (train,), (loose,), build_test_loader, "validation set")


@pytest.mark.parametrize("bare", ["train", "test"])
def test_a_set_without_labels_is_named_with_what_to_give(bare: str, tiny_cfg: CfgNode, tmp_path: Path) -> None:
    sets = {name: _folder(tmp_path / name, {"cat": 2}) for name in ("train", "test")}
    (tmp_path / bare / "cat" / "0.png").rename(tmp_path / bare / "loose.png")
    with pytest.raises(ValueError, match=rf"'knn' needs labels, and .*/{bare}'\]? has none.*TEST\.KNN\.TRAIN"):
        _match(tiny_cfg, sets["train"], sets["test"])


def test_images_in_both_sets_are_counted_and_warned_of(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _folder(tmp_path / "all", {"cat": 3, "fox": 2})
    everything, cats = f"folder:{tmp_path}/all", f"folder:{tmp_path}/all/cat/.."
    assert len(shared_images(build_dataset(everything), build_dataset(cats))) == 5
    _match(tiny_cfg, everything, cats)
    assert any("5 of 5 images of the test set" in message for message in caplog.messages)
    caplog.clear()
    other = _folder(tmp_path / "other", {"cat": 2, "fox": 2})
    for i, path in enumerate(sorted((tmp_path / "other").rglob("*.png"))):
        Image.fromarray(np.full((8, 8), 50 + i, np.uint8)).save(path)
    _match(tiny_cfg, everything, other)
    assert caplog.messages == []


def test_a_class_with_one_training_image_is_warned_of(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = _folder(tmp_path / "train", {"cat": 2, "dog": 1, "fox": 1})
    test = _folder(tmp_path / "test", {"cat": 1, "dog": 1, "fox": 1})
    with caplog.at_level(logging.WARNING):
        _match(tiny_cfg, train, test)
    assert "2 class(es) have a single training image: dog, fox." in caplog.messages
