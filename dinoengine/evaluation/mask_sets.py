"""A training set with masks beside a test set with masks: which class means what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.build import LoaderFactory, UnsuitableTestSetError
from dinoengine.evaluation.label_sets import joined_names, labels_by_name, training_strings
from dinoengine.evaluation.overlap import warn_of_shared_images
from dinoengine.structures import IGNORE


@dataclass(frozen=True)
class MaskSets:
    """
    Attributes:
        train_loader: ImageBatch of this rank's part of the training set, evaluation crops with their masks.
        train_classes: [256] uint8: the class of the test set for each class of the training set, matched by name; classes
            that the test set lacks have numbers above its own, ``IGNORE`` stays.
        test_set: names its images in messages.
        class_names: by class of the test set, those classes included.
    """

    train_loader: Any
    train_classes: Tensor
    class_names: list[str]
    test_set: ImageDataset

    @property
    def train_set(self) -> ImageDataset:
        dataset: ImageDataset = self.train_loader.dataset.dataset
        return dataset

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def relabelled(self, train_masks: Tensor) -> Tensor:
        """Masks of the training set, uint8, in classes of the test set."""
        return self.train_classes.to(train_masks.device)[train_masks.long()]


def match_mask_sets(
    cfg: CfgNode, evaluator: str, train: Sequence[str], test: str, make_loader: LoaderFactory
) -> MaskSets:
    """What ``match_label_sets`` is for labels. Warns of images that are in both sets.

    Args:
        evaluator: its name in TEST.EVALUATORS, for messages.
        train: dataset strings; empty: TEST.TRAIN_PER_TEST or DATASETS.TRAIN.

    Raises:
        UnsuitableTestSetError: if the test set has no masks.
        ValueError: if the training set has none, or they share no class; better now than after the training.
    """
    test_set = make_loader(cfg, test).dataset.dataset
    test_names = test_set.mask_class_names
    if test_names is None:
        raise UnsuitableTestSetError(
            _no_masks(evaluator, f"the test set {test!r}")
            + (" It has labels of whole images, which 'knn' is for." if test_set.has_labels else "")
        )
    strings = training_strings(cfg, train, test)
    if not strings:
        raise ValueError(_no_masks(evaluator, "its training set (none is named)"))
    train_loader = make_loader(cfg, strings)
    train_set = train_loader.dataset.dataset
    train_names = train_set.mask_class_names
    if train_names is None:
        raise ValueError(_no_masks(evaluator, f"its training set {list(strings)}"))
    if not set(train_names) & set(test_names):
        raise ValueError(
            f"The masks of the training set {list(strings)} and of the test set {test!r} have no class in common; classes "
            "are matched by their names in classes.txt."
        )
    numbers = labels_by_name(train_names, test_names)
    names = joined_names(train_names, test_names)
    if len(names) > IGNORE:
        raise ValueError(
            f"The masks of training and test set have {len(names)} classes together; at most {IGNORE} are possible."
        )
    train_classes = torch.full((256,), IGNORE, dtype=torch.uint8)
    train_classes[: len(numbers)] = torch.tensor(numbers, dtype=torch.uint8)
    warn_of_shared_images(train_set, test_set, f"test set {test!r}", strings)
    return MaskSets(train_loader, train_classes, names, test_set)


def _no_masks(evaluator: str, which: str) -> str:
    return (
        f"The evaluator {evaluator!r} needs masks, and {which} has none (several datasets have masks together only if they "
        f"have the same classes). Give datasets with masks, e.g. masks:/path/to/val, in DATASETS.TEST and "
        f"TEST.{evaluator.upper()}.TRAIN (if that is empty, DATASETS.TRAIN)."
    )
