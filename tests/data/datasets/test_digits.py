from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dinoengine.data import Digits


def test_splits_are_the_first_1437_and_the_last_360_of_the_file():
    train, test, everything = (Digits(split=s) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    labels = load_digits().target.tolist()
    assert [train.label(i) for i in range(1437)] == labels[:1437]
    assert [test.label(i) for i in range(360)] == labels[1437:]
    assert [everything.label(i) for i in range(1797)] == labels
    for i in (0, 1436, 1437, 1796):
        part = train.load(i) if i < 1437 else test.load(i - 1437)
        assert np.array_equal(np.asarray(part), np.asarray(everything.load(i)))


def test_default_is_the_train_split():
    assert len(Digits()) == 1437


def test_scans_are_grey_8_by_8_and_16_levels_become_0_to_255():
    dataset = Digits(split="all")
    image = dataset.load(17)
    assert image.mode == "L"
    assert image.size == (8, 8)
    source = load_digits().images
    values = np.stack([np.asarray(dataset.load(i)) for i in range(len(dataset))])
    assert values.min() == 0
    assert values.max() == 255
    # Each of the 17 grey levels keeps a value of its own, within half a step of 255/16 times the level.
    assert len(np.unique(values)) == 17
    assert np.abs(values - source * 255 / 16).max() <= 0.5


def test_classes_describe_and_labels():
    dataset = Digits(split="test")
    assert dataset.class_names == list("0123456789")
    assert dataset.has_labels
    assert dataset.describe(17) == "digits:split=test[17]"
    assert type(dataset[3].label) is int


def test_unknown_split_names_the_closest_and_all():
    with pytest.raises(ValueError, match=r"train, test, all; got 'tset' \(did you mean 'test'\?\)"):
        Digits(split="tset")


def test_a_pickled_copy_is_the_same():
    dataset = Digits(split="test")
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == 360
    assert copy.label(5) == dataset.label(5)
    assert np.array_equal(np.asarray(copy.load(5)), np.asarray(dataset.load(5)))
