from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.evaluation import match_mask_sets
from tests.masks import write_mask_folder


def _folder(path: Path, names: list[str]) -> str:
    text = write_mask_folder(path, 1)
    (path / "classes.txt").write_text("\n".join(names))
    return text


def test_classes_meet_by_name(tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = _folder(tmp_path / "train", ["sky", "tree", "car", "road"])
    test = _folder(tmp_path / "test", ["road", "sky", "person"])
    sets = match_mask_sets(tiny_cfg, "segmentation", [train], test, build_test_loader)
    assert sets.class_names == ["road", "sky", "person", "tree", "car"]
    assert sets.num_classes == 5
    masks = torch.tensor([[[0, 1, 2, 3, 255]]], dtype=torch.uint8)
    assert sets.relabelled(masks).tolist() == [[[1, 3, 4, 0, 255]]]
    assert sets.relabelled(masks).dtype == torch.uint8
    assert len(sets.train_set) == 1
    assert "No training image has the class(es) person" in caplog.text


def test_images_in_both_sets_are_said(tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_cfg.DATASETS.TRAIN = (write_mask_folder(tmp_path, 2),)
    match_mask_sets(tiny_cfg, "dense_knn", (), f"masks:{tmp_path}", build_test_loader)
    assert "2 of 2 images of the test set" in caplog.text


def test_what_does_not_fit_is_refused(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    good, other = (_folder(tmp_path / name, [f"{name}{i}" for i in range(200)]) for name in ("a", "b"))
    plain = "synthetic:num_images=2"

    def match(train: list[str], test: str) -> None:
        match_mask_sets(tiny_cfg, "dense_knn", train, test, build_test_loader)

    with pytest.raises(
        ValueError, match=r"'dense_knn' needs masks, and its training set \['synthetic:.*TEST\.DENSE_KNN"
    ):
        match([plain], good)
    with pytest.raises(ValueError, match=r"needs masks, and the test set 'synthetic:num_images=2' has none"):
        match([good], plain)
    with pytest.raises(ValueError, match=r"needs masks, and its training set \['masks:.* has none \(several datasets"):
        match([good, other], good)
    with pytest.raises(
        ValueError, match=r"have no class in common; classes are matched by their names in classes\.txt"
    ):
        match([good], other)
    (tmp_path / "b" / "classes.txt").write_text("\n".join(["a0", *(f"b{i}" for i in range(199))]))
    with pytest.raises(ValueError, match="399 classes together; at most 255"):
        match([good], other)
    tiny_cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"its training set \(none is named\)"):
        match([], good)


def test_each_test_set_may_have_a_training_set_of_its_own(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    names = ["sky", "tree", "car"]
    trains = [_folder(tmp_path / name, names) for name in ("train0", "train1")]
    tests = [_folder(tmp_path / name, names) for name in ("test0", "test1")]
    tiny_cfg.merge_from_list(["DATASETS.TEST", tuple(tests), "TEST.TRAIN_PER_TEST", tuple(trains)])
    for i, test in enumerate(tests):
        sets = match_mask_sets(tiny_cfg, "dense_knn", [], test, build_test_loader)
        assert f"/train{i}/" in sets.train_set.describe(0)
