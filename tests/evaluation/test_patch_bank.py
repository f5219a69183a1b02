from __future__ import annotations

import numpy as np
import pytest
import torch

from dinoengine.evaluation.patch_bank import PatchBank, patch_classes
from dinoengine.structures import IGNORE


def test_the_class_of_a_patch_is_that_of_most_of_its_pixels() -> None:
    mask = torch.tensor(
        [
            [0, 1, 2, IGNORE, IGNORE, IGNORE],
            [1, 1, IGNORE, IGNORE, IGNORE, IGNORE],
            [2, 1, 0, 0, 2, IGNORE],
            [1, 2, 0, 2, 1, 1],
        ],
        dtype=torch.uint8,
    )
    # by patches of 2 x 2: three of class 1; one pixel has a class; none has; 1 and 2 twice each; ...
    assert patch_classes(mask[None], (2, 3), 3).tolist() == [[1, 2, IGNORE, 1, 0, 1]]


def test_it_is_a_majority_on_any_grid() -> None:
    rng = np.random.default_rng(0)
    masks = rng.choice([0, 1, 2, 3, IGNORE], (3, 12, 10)).astype(np.uint8)
    found = patch_classes(torch.tensor(masks), (4, 2), 4).view(3, 4, 2)
    for image, row, column in np.ndindex(3, 4, 2):
        cell = masks[image, 3 * row : 3 * row + 3, 5 * column : 5 * column + 5]
        counts = [(cell == number).sum() for number in range(4)]
        assert found[image, row, column] == int(np.argmax(counts))


NUM_IMAGES, NUM_PATCHES = 12, 10


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    """The feature of patch j of image i is (i, j); classes 0, 0, 0, 0, 0, 0, 1, 1, 2 and one patch without."""
    features = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij"), dim=2)
    classes = torch.tensor([0] * 6 + [1, 1, 2, IGNORE]).expand(NUM_IMAGES, -1)
    return features, classes


def _sample(num: int, *, batch: int = 5, seed: int = 0, balanced: bool = False) -> list[tuple[int, ...]]:
    features, classes = _data()
    bank = PatchBank(num, 3, seed=seed, balanced=balanced)
    for part in torch.arange(NUM_IMAGES).split(batch):
        bank.add(features[part], classes[part], part)
    found = bank.finish()
    assert found.labels is not None
    rows = [tuple(row) for row in found.features.int().tolist()]
    assert [int(classes[row]) for row in rows] == found.labels.tolist()
    return rows


def test_a_bank_with_room_holds_every_patch_with_a_class_once() -> None:
    rows = _sample(1000)
    assert sorted(rows) == [(i, j) for i in range(NUM_IMAGES) for j in range(9)]


@pytest.mark.parametrize("balanced", [False, True])
def test_the_sample_depends_on_the_seed_alone(balanced: bool) -> None:
    first = _sample(20, balanced=balanced)
    assert all(_sample(20, batch=batch, balanced=balanced) == first for batch in (1, 3, 12))
    assert _sample(20, seed=1, balanced=balanced) != first
    assert set(first) < set(_sample(60, balanced=balanced))  # a smaller bank is part of a larger one


def test_sizes_are_exact() -> None:
    assert len(set(_sample(17))) == 17
    balanced = _sample(48, balanced=True)  # 16 of each class; class 2 has 12 patches
    counts = [sum(low <= j < high for _, j in balanced) for low, high in ((0, 6), (6, 8), (8, 9))]
    assert counts == [16, 16, 12]


def test_every_patch_has_the_same_chance() -> None:
    """Of 108 patches 27 are drawn; over 200 seeds each is there 50 times, give or take 6.1."""
    counts = np.zeros((NUM_IMAGES, NUM_PATCHES))
    for seed in range(200):
        for row in _sample(27, batch=12, seed=seed):
            counts[row] += 1
    assert abs(counts[:, :9] - 50).max() < 4.5 * 6.13


def test_a_bank_of_nothing_is_an_error() -> None:
    bank = PatchBank(5, 3, seed=0, balanced=False)
    bank.add(torch.zeros(2, 4, 3), torch.full((2, 4), IGNORE), torch.arange(2))
    with pytest.raises(ValueError, match="No patch of the training set has a pixel with a class"):
        bank.finish()
    bank.add(torch.full((1, 4, 3), torch.nan), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"features of 1 of 3 images are not finite, e\.g\. images number \[7\]"):
        bank.finish()
