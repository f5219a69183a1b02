"""Logistic regression where an image shows several classes: a binary one per class, judged by mean average precision.

The 11-point mAP is the measure of PASCAL VOC 2007 and, for it, of the transfer protocol (arXiv:2002.05709, B.8). That an
image which does not count for a class (difficult objects) is not fitted to either is ours, as is one C for all classes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.average_precision import average_precision, eleven_point_average_precision
from dinoengine.evaluation.build import LoaderFactory
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import FeatureCollector, Features, extract_features
from dinoengine.evaluation.label_sets import labels_by_name, no_labels, training_strings, warn_of_shared_images
from dinoengine.evaluation.logreg import CHAIN, LogregSettings, Regression, Rows, split_held_out, warn_of_fits
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)


class MultiLabelRows(NamedTuple):
    """Features [N, D] in fp32 or fp64, and labels [N, K] int8: see ``ImageDataset.multi_label``."""

    features: np.ndarray
    labels: np.ndarray

    def of_class(self, k: int) -> Rows:
        """The rows that count for a class; their labels [n] bool."""
        counted = self.labels[:, k] != 0
        return Rows(self.features[counted], self.labels[counted, k] == 1)


class Precision(NamedTuple):
    """Of one class by one regression, or means over the classes, in 0..1."""

    average: float
    eleven_point: float


class Fit(NamedTuple):
    """What came of fitting to one class with one C; ``converged`` is None where there was nothing to tell apart."""

    c: float
    class_number: int
    precision: Precision
    converged: bool | None


def label_matrix(dataset: ImageDataset, class_names: Sequence[str]) -> np.ndarray:
    """[N, K] int8, its columns those of ``class_names``; a class that the dataset lacks counts for no image.

    Raises:
        ValueError: if they have no class in common.
    """
    own_names = dataset.multi_label_class_names
    assert own_names is not None, "a multi-label dataset"
    labels = np.array([dataset.multi_label(i) for i in range(len(dataset))], dtype=np.int8)
    matrix = np.zeros((len(dataset), len(class_names)), dtype=np.int8)
    for own, label in enumerate(labels_by_name(own_names, class_names)):
        if label < len(class_names):
            matrix[:, label] = labels[:, own]
    return matrix


def fit_and_judge(
    fit: MultiLabelRows, judge: MultiLabelRows, chains: Sequence[Sequence[float]], settings: LogregSettings
) -> list[Fit]:
    """Fit to those classes that an image of ``judge`` shows, with each C, and judge by that set.

    The processes share the fits; all must call it with the same rows.

    Args:
        chains: values of C; those of one are fitted one after the other, each from the solution before.

    Returns:
        All fits, by C and class, on every process. A class that all rows of ``fit`` show, or none, is not fitted to: all
        images get the same score for it.

    Raises:
        ValueError: if no image of ``judge`` shows a class.
    """
    classes = np.flatnonzero((judge.labels == 1).any(axis=0)).tolist()
    if not classes:
        raise ValueError(
            f"Mean average precision needs images that show a class, and none of {len(judge.labels)} does."
        )
    world_size = comm.get_world_size()
    jobs = [(k, chain) for k in classes for chain in chains]
    most = max(sum(len(chain) for _, chain in jobs[rank::world_size]) for rank in range(world_size))
    mine = _fits(fit, judge, jobs[comm.get_rank() :: world_size], settings)
    fits: list[Fit] = []
    for _ in range(most):
        # After each fit, not once at the end: collectives have a time limit, and some fits take far longer.
        fits += [found for found in comm.gather_results(functools.partial(next, mine, None)) if found is not None]
        message = f"Logistic regression: {len(fits)} of {len(classes) * sum(map(len, chains))} fits"
        log_every_n_seconds(logging.INFO, message, 30, name=__name__, key="progress")
    return sorted(fits)


def _fits(
    fit: MultiLabelRows,
    judge: MultiLabelRows,
    jobs: Sequence[tuple[int, Sequence[float]]],
    settings: LogregSettings,
) -> Iterator[Fit]:
    for k, chain in jobs:
        rows, judged = fit.of_class(k), judge.of_class(k)
        regression = Regression(settings)
        for c in chain:
            scores, converged = np.zeros(len(judged.labels)), None
            if 0 < rows.labels.sum() < len(rows.labels):
                before = regression.num_unconverged
                regression.fit(rows, c)
                scores, converged = regression.scores(judged.features)[:, 1], regression.num_unconverged == before
            precision = Precision(
                average_precision(scores, judged.labels), eleven_point_average_precision(scores, judged.labels)
            )
            yield Fit(c, k, precision, converged)


def mean_precisions(fits: Sequence[Fit]) -> dict[float, Precision]:
    """C -> means over the classes, by rising C."""
    by_c: dict[float, list[Precision]] = {}
    for found in sorted(fits):
        by_c.setdefault(found.c, []).append(found.precision)
    return {c: Precision(*np.mean(of_c, axis=0).tolist()) for c, of_c in by_c.items()}


def best_c(fits: Sequence[Fit]) -> float:
    """The C with the highest 11-point mAP, one for all classes; of equal ones the smallest."""
    precisions = mean_precisions(fits)
    best = max(precisions, key=lambda c: precisions[c].eleven_point)
    value = 100 * precisions[best].eleven_point
    logger.info("Logistic regression: C %.3g has an 11-point mAP of %.2f %% on the held-out images.", best, value)
    return best


class MultiLabelLogregEvaluator(DatasetEvaluator):
    """``{"logreg": {"map_11_point": ..., "map": ...}}`` in percent, over the classes that a test image shows."""

    def __init__(
        self,
        train_loader: Any,
        settings: LogregSettings,
        *,
        train_labels: np.ndarray,
        test_labels: np.ndarray,
        val_loader: Any = None,
        val_labels: np.ndarray | None = None,
        test_set: ImageDataset | None = None,
    ) -> None:
        """
        Args:
            train_loader, val_loader: ImageBatch of this rank's part; without ``val_loader`` C is chosen on a part of the
                training set.
            train_labels, test_labels, val_labels: [N, K] int8, of all images of their sets; see ``label_matrix``.
            test_set: names its images in messages.
        """
        self.train_loader = train_loader
        self.settings = settings
        self.train_labels = train_labels
        self.test_labels = test_labels
        self.val_loader = val_loader
        self.val_labels = val_labels
        self.test_set = test_set
        self._train: MultiLabelRows | None = None
        self._val: MultiLabelRows | None = None
        self._test = FeatureCollector(test_set)

    def prepare(self, model: nn.Module) -> None:
        self._train = self._rows(extract_features(model, self.train_loader), self.train_labels)
        if self.val_labels is not None:
            self._val = self._rows(extract_features(model, self.val_loader), self.val_labels)

    def _rows(self, features: Features, labels: np.ndarray) -> MultiLabelRows:
        return MultiLabelRows(features.features.numpy().astype(self.settings.dtype), labels)

    def reset(self) -> None:
        self._test = FeatureCollector(self.test_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        self._test.add(output.cls_token, None, batch.indices)

    def evaluate(self) -> Results:
        """
        Raises:
            ValueError: if no image shows a class where C is chosen or in the test set, or there is none to hold out.
        """
        assert self._train is not None, "prepare() comes before evaluate()"
        test = self._rows(self._test.finish(), self.test_labels)
        fit, judge, everything = self._split(self._train)
        cs = self.settings.cs
        fits = fit_and_judge(fit, judge, [cs[i : i + CHAIN] for i in range(0, len(cs), CHAIN)], self.settings)
        c = best_c(fits)
        last = fit_and_judge(everything, test, [(c,)], self.settings)
        self._train, self._val = None, None  # of the weights as they were; the next call has others
        converged = [found.converged for found in (*fits, *last) if found.converged is not None]
        warn_of_fits(self.settings, c, converged.count(False), len(converged))
        precision = mean_precisions(last)[c]
        return {"logreg": {"map_11_point": 100 * precision.eleven_point, "map": 100 * precision.average}}

    def _split(self, train: MultiLabelRows) -> tuple[MultiLabelRows, MultiLabelRows, MultiLabelRows]:
        """What C is chosen by: rows to fit to and rows to judge by; and the rows of the last fit."""
        if self._val is not None:
            everything = (np.concatenate(parts) for parts in zip(train, self._val, strict=True))
            return train, self._val, MultiLabelRows(*everything)
        keep, held_out = split_held_out(train.labels, self.settings.held_out, self.settings.seed)
        fit, judge = (MultiLabelRows(*(part[rows] for part in train)) for rows in (keep, held_out))
        return fit, judge, train

    def protocol(self) -> dict[str, Any]:
        num_val_images = 0 if self.val_labels is None else len(self.val_labels)
        images = {"num_train_images": len(self.train_labels), "num_val_images": num_val_images}
        more = {"labels": "multi-label: a binary regression per class, C by 11-point mAP"}
        return {"logreg": {**images, **self.settings.protocol(by_share=self.val_loader is None), **more}}


def build_multi_label_logreg(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.LOGREG for a multi-label test set.

    Raises:
        ValueError: if another dataset is not multi-label, or sets share no class; better now than after the training.
    """
    strings, val = training_strings(cfg, cfg.TEST.LOGREG.TRAIN, dataset), cfg.TEST.LOGREG.VAL
    if not strings:
        raise ValueError(no_labels("logreg", "its training set (none is named)"))
    test_set = make_loader(cfg, dataset).dataset.dataset
    train_loader, val_loader = make_loader(cfg, strings), make_loader(cfg, val) if val else None
    loaders = {f"its training set {list(strings)}": train_loader, f"the validation set {list(val)}": val_loader}
    for which, loader in loaders.items():
        if loader is not None and loader.dataset.dataset.multi_label_class_names is None:
            raise ValueError(
                f"The test set {dataset!r} is multi-label, so {which} of the evaluator 'logreg' must be, too, and it is "
                "not. See TEST.LOGREG.TRAIN and VAL, TEST.TRAIN_PER_TEST and DATASETS.TRAIN; several datasets are "
                "multi-label together if they have the same classes."
            )
    train_set, names = train_loader.dataset.dataset, test_set.multi_label_class_names
    warn_of_shared_images(train_set, test_set, f"test set {dataset!r}", strings)
    train_labels, test_labels = label_matrix(train_set, names), label_matrix(test_set, names)
    val_labels = None if val_loader is None else label_matrix(val_loader.dataset.dataset, names)
    _warn_of_classes(
        train_labels if val_labels is None else np.concatenate((train_labels, val_labels)), test_labels, names
    )
    return MultiLabelLogregEvaluator(
        train_loader,
        LogregSettings.from_config(cfg),
        train_labels=train_labels,
        test_labels=test_labels,
        val_loader=val_loader,
        val_labels=val_labels,
        test_set=test_set,
    )


def _warn_of_classes(train_labels: np.ndarray, test_labels: np.ndarray, names: Sequence[str]) -> None:
    untaught = ~((train_labels == 1).any(axis=0) & (train_labels == -1).any(axis=0))
    unseen = ~(test_labels == 1).any(axis=0)
    for which, text in (
        (untaught, "have no training image that shows them, or none that does not, so all images get the same score"),
        (unseen, "are not in the means, as no test image shows them"),
    ):
        if which.any():
            found = [name for name, wrong in zip(names, which, strict=True) if wrong]
            logger.warning("Logistic regression: %d class(es) %s: %s.", len(found), text, ", ".join(found[:8]))
