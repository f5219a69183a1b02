"""Hashes of copies are near, of other images far; the search finds what comparing all with all finds."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dinoengine.data import Synthetic
from dinoengine.data import perceptual_hash as module
from dinoengine.data.perceptual_hash import MAX_DISTANCE, distances, groups_of, near_pairs, perceptual_hash
from tests.data.pictures import picture


def _hash(image: Image.Image) -> np.ndarray:
    return np.array([perceptual_hash(image.convert("L"))], dtype=np.uint64)


def _compressed(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=40)
    return Image.open(data)


@pytest.mark.parametrize(
    "change",
    [
        _compressed,
        lambda image: image.resize((101, 75)),
        lambda image: image.resize((640, 480)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.15),
        lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    ],
    ids=["compressed", "smaller", "larger", "brighter", "less contrast"],
)
def test_copies_are_near_and_other_images_are_not(change: Callable[[Any], Any]) -> None:
    pictures = [picture(seed) for seed in range(12)]
    hashes = np.concatenate([_hash(picture) for picture in pictures])
    copies = np.concatenate([_hash(change(picture)) for picture in pictures])
    assert distances(hashes, copies).max() <= 4
    assert min(distances(hashes[[i]], copies[[j]])[0] for i, j in itertools.permutations(range(12), 2)) > 4


def test_the_hash_is_the_signs_of_the_dct_about_the_median() -> None:
    """Written out with the sum of the definition, on an image that needs no resizing."""
    image = picture(0).convert("L").resize((32, 32))
    pixels = np.asarray(image, dtype=float)
    u, x = np.meshgrid(np.arange(8), np.arange(32), indexing="ij")
    rows = np.cos((2 * x + 1) * u * np.pi / 64)
    frequencies = np.array([[(pixels * np.outer(rows[v], rows[w])).sum() for w in range(8)] for v in range(8)]).ravel()
    bits = "".join("1" if value > np.median(frequencies[1:]) else "0" for value in frequencies)
    assert perceptual_hash(image) == int(bits, 2)


def test_distances_count_bits() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 2**64, 50, dtype=np.uint64) for _ in range(2))
    expected = [bin(int(a) ^ int(b)).count("1") for a, b in zip(first, second, strict=True)]
    assert distances(first, second).tolist() == expected


@pytest.mark.parametrize("max_distance", range(MAX_DISTANCE + 1))
def test_every_near_pair_is_found_once_and_no_other(max_distance: int) -> None:
    rng = np.random.default_rng(max_distance)
    centres = rng.integers(0, 2**64, 40, dtype=np.uint64)
    hashes = [int(centre) for centre in centres]
    for centre in centres:
        for num_bits in range(1, 9):
            flips = sum(1 << int(bit) for bit in rng.choice(64, num_bits, replace=False))
            hashes.append(int(centre) ^ flips)
    array = np.unique(np.array(hashes, dtype=np.uint64))
    expected = {
        (i, j) for i, j in itertools.combinations(range(len(array)), 2)
        if bin(int(array[i]) ^ int(array[j])).count("1") <= max_distance
    }  # fmt: skip
    found = near_pairs(array, max_distance)
    assert sorted(zip(found.first.tolist(), found.second.tolist(), strict=True)) == sorted(expected)
    assert found.is_complete


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count: int) -> None:
    found = near_pairs(np.arange(count, dtype=np.uint64), 4)
    assert (len(found.first), found.is_complete) == (0, True)


@pytest.mark.parametrize("distance", [-1, MAX_DISTANCE + 1])
def test_other_distances_are_refused(distance: int) -> None:
    with pytest.raises(ValueError, match=rf"0 to {MAX_DISTANCE} bits; got {distance}"):
        near_pairs(np.arange(3, dtype=np.uint64), distance)


def test_a_full_bucket_is_given_up_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NEIGHBOURS", 5)
    assert not near_pairs(np.arange(100, dtype=np.uint64), 4).is_complete  # all share the upper bits


def test_many_pairs_become_a_tree_of_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    centres = rng.integers(0, 2**64, 5, dtype=np.uint64)
    hashes = np.unique(np.concatenate([centre ^ np.arange(16, dtype=np.uint64) for centre in centres]))
    whole = near_pairs(hashes, 4)
    monkeypatch.setattr(module, "_MOST_PAIRS", 50)
    thin = near_pairs(hashes, 4)
    assert len(thin.first) < len(whole.first) == 5 * 120
    assert not thin.is_complete
    groups = [groups_of(pairs.first, pairs.second, len(hashes)) for pairs in (whole, thin)]
    assert len(set(zip(*(g.tolist() for g in groups), strict=True))) == 5  # one to one


def test_groups_are_what_hangs_together() -> None:
    groups = groups_of(np.array([0, 1, 5]), np.array([1, 4, 6]), 8).tolist()
    assert groups[0] == groups[1] == groups[4]
    assert groups[5] == groups[6]
    assert len(set(groups)) == 5  # {0, 1, 4}, {5, 6}, 2, 3, 7


def test_the_images_of_a_generator_of_textures_differ() -> None:
    images = Synthetic(num_images=30, size=48)
    hashes = np.array([perceptual_hash(images.load(i).convert("L")) for i in range(30)], dtype=np.uint64)
    assert len(np.unique(hashes)) == 30
