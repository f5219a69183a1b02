from __future__ import annotations

import pytest

from dinoengine.data.datasets.imagenet_extra import image_name


@pytest.mark.parametrize(
    ("split", "class_id", "number", "own_names", "expected"),
    [
        ("TRAIN", "n01440764", 10026, True, "n01440764/n01440764_10026"),
        ("VAL", "n01751748", 1, False, "n01751748/ILSVRC2012_val_00000001"),
        ("TEST", "", 100_000, False, "ILSVRC2012_test_00100000"),
    ],
)
def test_names_as_the_published_set_has_them(
    split: str, class_id: str, number: int, own_names: bool, expected: str
) -> None:
    assert image_name(split, class_id, number, own_names) == expected
