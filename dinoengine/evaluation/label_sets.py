"""A labelled training set beside a test set: whether they fit together, and which label means what.

Every evaluator that learns from one labelled set and answers for another goes through ``match_label_sets``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.build import LoaderFactory, UnsuitableTestSetError
from dinoengine.evaluation.overlap import warn_of_shared_images
from dinoengine.utils.logger import log_first_n

logger = logging.getLogger(__name__)

_TEST_SET = "test set"


@dataclass(frozen=True)
class LabelSets:
    """
    Attributes:
        train_strings: the training set.
        train_loader: ImageBatch of this rank's part of it, evaluation crops.
        train_labels: [labels of the training set]: the label of the test set for the same class name. Classes that the
            test set lacks have numbers above its own.
        class_names: by label of the test set, those classes included; so labels are 0..len-1 in both sets.
    """

    train_strings: tuple[str, ...]
    train_loader: Any
    train_labels: list[int]
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def train_class_of(self) -> list[int]:
        """By label of the test set: the label of the training set for the same class, -1 where that has none."""
        number = {label: i for i, label in enumerate(self.train_labels)}
        return [number.get(label, -1) for label in range(self.num_classes)]


def match_label_sets(
    cfg: CfgNode,
    evaluator: str,
    train: Sequence[str],
    test: str | Sequence[str],
    make_loader: LoaderFactory,
    which: str = _TEST_SET,
) -> LabelSets:
    """The training set of an evaluator, its classes matched by name with those of the test set.

    Warns of images that are in both sets (copies of files too) and of classes with a single training image.

    Args:
        evaluator: its name in TEST.EVALUATORS, for messages.
        train: dataset strings; empty: that of ``training_strings``.
        test: a dataset string, or several that are one set.
        which: what the test set is called in messages, if it is another set than that.

    Raises:
        UnsuitableTestSetError: if the test set has no labels, or is multi-label.
        ValueError: if another set has none, or they share no class; better now than after the training.
    """
    test_set = make_loader(cfg, test).dataset.dataset
    error = UnsuitableTestSetError if which == _TEST_SET else ValueError
    test_names = class_names(test_set, evaluator, f"the {which} {test!r}", error)
    strings = training_strings(cfg, train, test)
    if not strings:
        raise ValueError(no_labels(evaluator, "its training set (none is named)"))
    train_loader = make_loader(cfg, strings)
    train_set = train_loader.dataset.dataset
    train_names = class_names(train_set, evaluator, f"its training set {list(strings)}")
    train_labels = labels_by_name(train_names, test_names)
    warn_of_shared_images(train_set, test_set, f"{which} {test!r}", strings)
    _warn_of_single_images(train_set, train_names)
    return LabelSets(strings, train_loader, train_labels, joined_names(train_names, test_names))


def training_strings(cfg: CfgNode, train: Sequence[str], test: str | Sequence[str]) -> tuple[str, ...]:
    """The training set of an evaluator: its own, or that of the test set in TEST.TRAIN_PER_TEST, or DATASETS.TRAIN."""
    if train:
        return tuple(train)
    if cfg.TEST.TRAIN_PER_TEST and test in cfg.DATASETS.TEST:
        return (cfg.TEST.TRAIN_PER_TEST[cfg.DATASETS.TEST.index(test)],)
    return tuple(cfg.DATASETS.TRAIN)


def no_labels(evaluator: str, which: str) -> str:
    """The message for a set without labels; ``which`` says which."""
    return (
        f"The evaluator {evaluator!r} needs labels, and {which} has none. Give labelled datasets in DATASETS.TEST and "
        f"TEST.{evaluator.upper()}.TRAIN (if that is empty, DATASETS.TRAIN), e.g. a folder with one sub-folder per class; "
        f"or take {evaluator!r} out of TEST.EVALUATORS."
    )


def require_single_label(
    dataset: ImageDataset, evaluator: str, which: str, error: type[ValueError] = ValueError
) -> None:
    """See that images do not show several classes each; ``which`` set it is, for messages.

    Raises:
        error: if they do; UnsuitableTestSetError is for a test set.
    """
    if dataset.multi_label_class_names is not None:
        raise error(
            f"The evaluator {evaluator!r} needs one class per image, and {which} is multi-label. Multi-label test sets are "
            "for the evaluator 'logreg', with a multi-label training set (and validation set, if there is one)."
        )


def class_names(dataset: ImageDataset, evaluator: str, which: str, error: type[ValueError] = ValueError) -> list[str]:
    """The class names of a dataset; ``which`` says what it is if there are none, or several to an image (``error``)."""
    require_single_label(dataset, evaluator, which, error)
    if dataset.class_names is None:
        raise error(_no_labels_in(dataset, evaluator, which))
    return dataset.class_names


def _no_labels_in(dataset: ImageDataset, evaluator: str, which: str) -> str:
    masks = "" if dataset.mask_class_names is None else " It has masks, which 'dense_knn' and 'segmentation' are for."
    return no_labels(evaluator, which) + masks


def labels_by_name(train_names: Sequence[str], test_names: Sequence[str]) -> list[int]:
    """The label each class of the training set has in the test set; classes unknown there get numbers above its own.

    Labels count the classes of their own dataset, so a folder that lacks a class numbers the others differently.

    Raises:
        ValueError: if they have no class in common.
    """
    index = {name: i for i, name in enumerate(test_names)}
    if not index.keys() & set(train_names):
        raise ValueError(
            f"The training set (classes {_some(train_names)}) and the test set (classes {_some(test_names)}) have no "
            "class in common, so no answer could be right. Their first-level folders must have the same names."
        )
    if only_in_test := sorted(index.keys() - set(train_names)):
        logger.warning("No training image has the class(es) %s of the test set.", _some(only_in_test))
    return [index.setdefault(name, len(index)) for name in train_names]


def joined_names(train_names: Sequence[str], test_names: Sequence[str]) -> list[str]:
    """Class names by the labels that ``labels_by_name`` gives: those of the test set, then those it lacks."""
    return list(dict.fromkeys((*test_names, *train_names)))


def _warn_of_single_images(train_set: ImageDataset, names: Sequence[str]) -> None:
    counts = np.bincount(train_set.labels(), minlength=len(names))
    if single := [name for name, count in zip(names, counts, strict=True) if count == 1]:
        log_first_n(
            logging.WARNING,
            f"{len(single)} class(es) have a single training image: {_some(single)}.",
            name=__name__,
        )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
