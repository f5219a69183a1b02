from __future__ import annotations

import pickle

import numpy as np
import pytest

from dinoengine.data import Synthetic


def test_an_image_depends_on_seed_and_index_alone():
    one, other = Synthetic(num_images=20, size=16), Synthetic(num_images=500, size=16)
    forward = [one.render(i) for i in range(20)]
    backward = [other.render(i) for i in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(Synthetic(size=16, seed=1).render(0), forward[0])


def test_rendering_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is what is tested
    Synthetic(size=8).render(0)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("size", [4, 7, 64])
def test_format(size: int):
    image = Synthetic(size=size).load(0)
    assert image.mode == "RGB"
    assert image.size == (size, size)


def test_classes_take_turns_and_have_names():
    dataset = Synthetic(num_images=20, num_classes=6, size=8)
    assert len(dataset) == 20
    assert [dataset.label(i) for i in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert dataset.class_names is not None
    assert len(set(dataset.class_names)) == 6
    assert dataset.describe(17) == "synthetic:seed=0[17]"


def test_images_of_one_class_differ():
    dataset = Synthetic(num_classes=2, size=16)
    images = [dataset.render(i) for i in range(0, 20, 2)]
    assert len({image.tobytes() for image in images}) == 10


def test_the_shape_of_the_class_is_in_the_image():
    """Area over the circle around the centroid tells the shapes apart, whatever position, radius and angle."""
    dataset = Synthetic(num_images=200, num_classes=5, size=64)  # plain disc, square, triangle, ring, cross
    names = dataset.class_names or []
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(200):
        image = dataset.render(i).astype(float)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        contrast = np.abs(image - np.median(border, axis=0)).max(axis=-1)
        if contrast.max() < 150:  # too little contrast to find the shape in the noise (sigma 12)
            continue
        y, x = np.nonzero(contrast > 75)
        reach = np.hypot(y - y.mean(), x - x.mean()).max()
        found[names[dataset.label(i) or 0]].append(len(y) / (np.pi * reach**2))
    triangle = 0.5 * (2 * 1.6 / 1.8) * 1.6 / (np.pi * (2 * 1.6 / 3) ** 2)  # base, height, corner to centroid
    expected = {
        "plain disc": 1.0,
        "plain square": 2 / np.pi,
        "plain triangle": triangle,
        "plain ring": 1 - 0.55**2,
        "plain cross": (4 - 4 * 0.7**2) / (np.pi * (1 + 0.3**2)),
    }
    assert min(len(values) for values in found.values()) >= 10
    assert {name: float(np.median(values)) for name, values in found.items()} == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_images": 0},
        {"num_images": -1},
        {"num_images": 10**20},
        {"num_classes": 0},
        {"num_classes": 16},
        {"size": 3},
    ],
)
def test_impossible_parameters_are_refused(arguments: dict[str, int]):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=rf"1 <= num_classes <= 15; got .*{name}={value}"):
        Synthetic(**arguments)


def test_a_pickled_copy_is_the_same():
    dataset = Synthetic(num_images=3, size=8, seed=4)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.render(2), dataset.render(2))
