from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.data import build_dataset


def _image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 2, 3), value, dtype=np.uint8)).save(path)


def test_typed_parameters_and_labels_that_only_items_have() -> None:
    dataset = build_dataset("torchvision:FakeData:size=6:num_classes=3:image_size=3,8,10")
    assert (len(dataset), dataset.class_names) == (6, ["0", "1", "2"])
    assert dataset.load(2).size == (10, 8)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    labels = [dataset.label(i) for i in range(6)]
    as_json = {"name": "torchvision", "dataset": "FakeData", "size": 6, "num_classes": 3, "image_size": [3, 8, 10]}
    again = build_dataset(json.dumps(as_json))
    assert labels == [again.label(i) for i in range(6)]
    assert set(labels) <= {0, 1, 2}
    assert torch.equal(torch.get_rng_state(), state)
    assert dataset.describe(1) == "torchvision:FakeData[1]"


def test_a_folder_with_the_names_of_its_classes(tmp_path: Path) -> None:
    for value, name in enumerate(("dog/1.png", "cat/2.png", "cat/3.png")):
        _image(tmp_path / name, value)
    dataset = build_dataset(f"torchvision:ImageFolder:root={tmp_path}")
    assert dataset.class_names == ["cat", "dog"]
    assert [(dataset.label(i), int(np.asarray(dataset.load(i))[0, 0, 0])) for i in range(3)] == [(0, 1), (0, 2), (1, 0)]


def test_a_published_layout_read_from_files(tmp_path: Path) -> None:
    """GTSRB keeps (file, number) pairs and has no names."""
    for name in ("00000/a.ppm", "00002/b.ppm"):
        _image(tmp_path / "gtsrb/GTSRB/Training" / name)
    dataset = build_dataset(f"torchvision:GTSRB:root={tmp_path}")
    assert ([dataset.label(i) for i in range(2)], dataset.class_names) == ([0, 1], ["0", "1"])


def test_items_without_one_number_make_it_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "anns.txt").write_text("")
    folder = tmp_path / "VOCdevkit/VOC2012"
    _image(folder / "JPEGImages/x.jpg")
    (folder / "Annotations").mkdir()
    (folder / "Annotations/x.xml").write_text("<annotation><folder>VOC2012</folder></annotation>")
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("x\n")
    dataset = build_dataset(f"torchvision:VOCDetection:root={tmp_path}")
    assert (len(dataset), dataset.has_labels, dataset.label(0)) == (1, False, None)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "torchvision:CIFR10:root=/r",
            r"no dataset 'CIFR10' \(did you mean 'CIFAR10'\?\)\. Write torchvision:NAME.*MNIST",
        ),
        (
            "torchvision:CIFAR10:rot=/r",
            r"'rot' is not understood \(did you mean 'root'\?\)\. Its keys: root, train, download",
        ),
        ("torchvision:CIFAR10", r"needs root; write torchvision:CIFAR10:root="),
        ("torchvision:CIFAR10:root=/r:train=yes", r"train must be bool, got 'yes'"),
        ("torchvision:STL10:root=/r:folds=x", r"folds must be int, got 'x'"),
        ("torchvision:FakeData:image_size=3,x,8", r"image_size must be int, got 'x'"),
        ("torchvision:FakeData:size=0", r"has no image"),
        ("torchvision", r"needs dataset"),
        ("torchvision:EMNIST:root=/r:split=letters:trian=false", r"\(did you mean 'train'\?\)"),
    ],
)
def test_wrong_strings(text: str, message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        build_dataset(text)


@pytest.mark.parametrize("name", ["CIFAR10", "SEMEION"])  # SEMEION downloads by default
def test_nothing_is_downloaded_unasked(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Dataset not found"):
        build_dataset(f"torchvision:{name}:root={tmp_path}")


def test_missing_files_are_told_in_terms_of_the_string(tmp_path: Path) -> None:
    text = f"torchvision:CIFAR10:root={tmp_path}"
    with pytest.raises(
        FileNotFoundError, match=f"^Dataset '{text}': torchvision says: .*key download=true to download"
    ):
        build_dataset(text)
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_devkit.*") as failed:  # it cannot be downloaded
        build_dataset(f"torchvision:ImageNet:root={tmp_path}")
    assert "download=true" not in str(failed.value)
