from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from dinoengine.data import FashionMNIST, build_dataset
from dinoengine.data.datasets.fashion_mnist import DEFAULT_ROOTS


def write_idx_files(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, packed: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    for kind, array in {"images-idx3": images, "labels-idx1": labels}.items():
        data = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
        path = folder / f"{split}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([0, 9, 3, 3, 1], dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True])
def test_images_and_labels_are_those_of_the_files(
    packed: bool, arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    write_idx_files(tmp_path / "raw", "t10k", *arrays, packed=packed)
    dataset = build_dataset(f"fashion-mnist:split=test:root={tmp_path}/raw")
    assert len(dataset) == 5
    for i in range(5):
        assert np.array_equal(np.asarray(dataset.load(i)), arrays[0][i])
        assert dataset.label(i) == arrays[1][i]
    assert dataset.class_names is not None
    assert dataset.class_names[9] == "Ankle boot"
    assert dataset.describe(3) == "fashion-mnist:split=test[3]"


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no train-images-idx3-ubyte\[\.gz\] in .*dataset-fashion-mnist.*root="
    ):
        FashionMNIST(root=str(tmp_path))
    with pytest.raises(ValueError, match="splits train, test; got 'tests' .did you mean 'test'"):
        FashionMNIST(split="tests")


@pytest.mark.parametrize("damage", ["short", "header", "gzip", "labels"])
def test_damaged_files_are_refused(damage: str, arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    images, labels = arrays
    write_idx_files(tmp_path, "train", images, labels[:4] if damage == "labels" else labels, packed=damage == "gzip")
    if damage != "labels":
        path = next(tmp_path.glob("train-images*"))
        data = path.read_bytes()
        path.write_bytes(b"\x01" + data[1:] if damage == "header" else data[:-7])
    with pytest.raises(ValueError, match="5 images and 4 labels" if damage == "labels" else "get it anew"):
        FashionMNIST(root=str(tmp_path))


@pytest.mark.skipif(
    not any((Path(root) / "train-images-idx3-ubyte.gz").exists() for root in DEFAULT_ROOTS),
    reason="Fashion-MNIST is not installed (Debian: dataset-fashion-mnist)",
)
def test_the_installed_files_are_the_published_set() -> None:
    train, test = FashionMNIST("train"), FashionMNIST("test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount([test.label(i) or 0 for i in range(10_000)]).tolist() == [1000] * 10
    assert [train.label(i) for i in range(5)] == [9, 0, 0, 3, 0]
