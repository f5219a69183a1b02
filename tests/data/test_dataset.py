from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import ConcatImageDataset, Digits, ImageDataset, ImageFolder, Synthetic, require_labels


class Numbered(ImageDataset):
    """Image i of dataset ``name`` is one pixel of value ``first + i``."""

    def __init__(self, name: str, size: int, first: int = 0, class_names: list[str] | None = None) -> None:
        self.name, self.size, self.first, self.class_names = name, size, first, class_names

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> Image.Image:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Image.fromarray(np.full((1, 1), self.first + index, dtype=np.uint8))

    def label(self, index: int) -> int | None:
        return index % 2 if self.class_names else None

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class Plain(ImageDataset):
    def __len__(self) -> int:
        return 1

    def load(self, index: int) -> Image.Image:
        return Image.new("L", (2, 2))


def _value(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0])


def test_a_dataset_without_labels_needs_only_length_and_load():
    dataset = Plain()
    sample = dataset[0]
    assert sample.label is None
    assert sample.image.size == (2, 2)
    assert dataset.class_names is None
    assert not dataset.has_labels
    assert dataset.describe(3) == "Plain[3]"


def test_a_dataset_without_load_cannot_be_made():
    class NoLoad(ImageDataset):
        def __len__(self) -> int:
            return 0

    with pytest.raises(TypeError, match="load"):
        NoLoad()  # type: ignore[abstract]


def test_concatenation_maps_every_index_to_its_part():
    parts = [Numbered("a", 3, 10), Numbered("b", 1, 20), Numbered("empty", 0), Numbered("c", 2, 30)]
    joined = ConcatImageDataset(parts)
    assert len(joined) == 6
    assert [_value(joined.load(i)) for i in range(6)] == [10, 11, 12, 20, 30, 31]
    assert [joined.describe(i) for i in range(6)] == ["a[0]", "a[1]", "a[2]", "b[0]", "c[0]", "c[1]"]


def test_concatenation_of_datasets_with_the_same_classes_keeps_their_labels():
    joined = ConcatImageDataset([Numbered("a", 3, class_names=["x", "y"]), Numbered("b", 2, class_names=["x", "y"])])
    assert joined.class_names == ["x", "y"]
    assert [joined.label(i) for i in range(5)] == [0, 1, 0, 0, 1]
    assert joined[4].label == 1


@pytest.mark.parametrize("other", [None, ["x", "z"], ["y", "x"], ["x"]])
def test_concatenation_of_different_classes_has_no_labels(other: list[str] | None):
    joined = ConcatImageDataset([Numbered("a", 2, class_names=["x", "y"]), Numbered("b", 2, class_names=other)])
    assert not joined.has_labels
    assert [joined.label(i) for i in range(4)] == [None] * 4
    assert joined[3].label is None


class Tagged(Numbered):
    """Multi-label: image i shows class i modulo the number of classes."""

    def __init__(self, name: str, size: int, classes: list[str]) -> None:
        super().__init__(name, size)
        self.multi_label_class_names: list[str] = classes

    def multi_label(self, index: int) -> np.ndarray:
        numbers = np.arange(len(self.multi_label_class_names))
        return np.where(numbers == index % len(numbers), 1, -1).astype(np.int8)


def test_a_dataset_is_not_multi_label_unless_it_says_so():
    assert Plain().multi_label_class_names is None
    assert Plain().multi_label(0) is None


def test_concatenation_of_multi_label_datasets():
    joined = ConcatImageDataset([Tagged("a", 3, ["x", "y"]), Tagged("b", 2, ["x", "y"])])
    assert joined.multi_label_class_names == ["x", "y"]
    assert [joined.multi_label(i).tolist() for i in (2, 3, 4)] == [[1, -1], [1, -1], [-1, 1]]  # type: ignore[union-attr]
    for other in (Tagged("b", 2, ["y", "x"]), Numbered("b", 2, class_names=["x", "y"])):
        mixed = ConcatImageDataset([Tagged("a", 3, ["x", "y"]), other])
        assert (mixed.multi_label_class_names, mixed.class_names) == (None, None)
        assert (mixed.multi_label(0), mixed.label(3)) == (None, None)


def test_a_classifier_is_not_trained_with_sets_of_classes():
    with pytest.raises(ValueError, match=r"one class per image, and DATASETS\.TRAIN is multi-label.*'logreg'"):
        require_labels(Tagged("a", 3, ["x", "y"]), 2, "DATASETS.TRAIN")


def test_an_index_past_the_end_of_a_concatenation_is_an_index_error():
    joined = ConcatImageDataset([Numbered("a", 2), Numbered("b", 2)])
    with pytest.raises(IndexError, match="range"):
        joined.load(4)


def test_a_negative_index_of_a_concatenation_is_the_last_image_or_an_error():
    folder_like = Synthetic(num_images=2, size=4), Digits(split="test")
    joined = ConcatImageDataset(folder_like)
    try:
        image = joined.load(-1)
    except IndexError:
        return
    assert np.array_equal(np.asarray(image), np.asarray(joined.load(len(joined) - 1)))


def _folder(root) -> ImageFolder:
    Image.new("L", (2, 2)).save(root / "1.png")
    return ImageFolder(str(root))


@pytest.mark.parametrize(
    "kind",
    ["folder", "digits", "synthetic"],
)
def test_iterating_over_a_dataset_ends_after_its_last_image(kind: str, tmp_path):
    make = {
        "folder": lambda: _folder(tmp_path),
        "digits": lambda: Digits(split="test"),
        "synthetic": lambda: Synthetic(num_images=3, size=4),
    }
    dataset = make[kind]()
    assert sum(1 for _ in islice(dataset, len(dataset) + 5)) == len(dataset)  # type: ignore[call-overload]


def test_all_labels_at_once():
    cat_dog = [Numbered("a", 3, class_names=["cat", "dog"]), Numbered("b", 2, class_names=["cat", "dog"])]
    assert cat_dog[0].labels().tolist() == [0, 1, 0]
    assert ConcatImageDataset(cat_dog).labels().tolist() == [0, 1, 0, 0, 1]
    for unlabelled in (Plain(), ConcatImageDataset([Plain(), cat_dog[0]])):
        with pytest.raises(ValueError, match="has no labels"):
            unlabelled.labels()


def test_which_of_several_datasets_an_image_is_from():
    joined = ConcatImageDataset([Numbered("a", 2), Numbered("b", 3)])
    assert [joined.source(i) for i in range(5)] == [0, 0, 1, 1, 1]
    assert Plain().source(0) is None
