"""Logistic regression on frozen features: the transfer protocol of DINOv2 (arXiv:2304.07193, section 7.1).

L2-regularised multinomial regression (scikit-learn, L-BFGS) on CLS tokens that are not normalised; C is chosen on
held-out images, then the regression is fitted to all.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.build import LoaderFactory
from dinoengine.evaluation.classification import tops_of
from dinoengine.evaluation.evaluator import DatasetEvaluator, Results
from dinoengine.evaluation.features import FeatureCollector, Features, dataset_of, extract_features
from dinoengine.evaluation.label_sets import match_label_sets
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)

# Values of C that are fitted one after the other, each from the solution before. Fixed, so that results do not depend
# on how many processes share the chains.
CHAIN = 9


class Rows(NamedTuple):
    """Features [N, D] in fp32 or fp64 and labels [N]."""

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class LogregSettings:
    """
    Attributes:
        cs: inverse regularisation strengths tried, rising.
        max_iter, tol: of L-BFGS.
        held_out: share of the training images that C is chosen on, if there is no validation set.
        seed: of their choice.
        dtype: of features and solver.
    """

    cs: tuple[float, ...] = tuple(10.0 ** np.linspace(-6, 5, 45))
    max_iter: int = 1000
    tol: float = 1e-12
    held_out: float = 0.1
    seed: int = 0
    dtype: str = "float64"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> LogregSettings:
        """TEST.LOGREG."""
        logreg = cfg.TEST.LOGREG
        low, high = logreg.C_LOG10_RANGE
        return cls(
            cs=tuple((10.0 ** np.linspace(low, high, logreg.NUM_C)).tolist()),
            max_iter=logreg.MAX_LBFGS_ITERS,
            tol=logreg.TOL,
            held_out=logreg.HELD_OUT,
            seed=logreg.SEED,
            dtype=logreg.DTYPE,
        )

    def protocol(self, *, by_share: bool) -> dict[str, Any]:
        """For ``DatasetEvaluator.protocol``; ``by_share``: C is chosen on a part of the training images."""
        return {
            "c": [float(f"{c:.6g}") for c in self.cs],
            "max_iter": self.max_iter,
            "tol": self.tol,
            "dtype": self.dtype,
            "held_out": self.held_out if by_share else 0,
            "seed": self.seed if by_share else None,
        }


class Regression:
    """One L-BFGS solution after the other, for rising C, each from the one before.

    Attributes:
        num_unconverged: fits that ended at ``max_iter`` or otherwise short of ``tol``.
    """

    def __init__(self, settings: LogregSettings) -> None:
        from sklearn.linear_model import LogisticRegression

        self._model = LogisticRegression(max_iter=settings.max_iter, tol=settings.tol, warm_start=True)
        self.num_unconverged = 0

    def fit(self, rows: Rows, c: float) -> None:
        from sklearn.exceptions import ConvergenceWarning

        self._model.C = c
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._model.fit(*rows)
        self.num_unconverged += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)

    def copy(self) -> Regression:
        """With the solution as it is now, to go on from it apart from this one."""
        return copy.deepcopy(self)

    def has_classes_of(self, rows: Rows) -> bool:
        """Whether the solution is for the classes of ``rows``: only then a fit to them can start from it."""
        return np.array_equal(self._model.classes_, np.unique(rows.labels))

    def hits(self, rows: Rows, top: int) -> np.ndarray:
        """[N] bool: whether the label is among the ``top`` most likely classes; never for a class it was not fitted to."""
        best = np.argsort(-self.scores(rows.features), axis=1, kind="stable")[:, :top]
        found: np.ndarray = (self._model.classes_[best] == rows.labels[:, None]).any(axis=1)
        return found

    def scores(self, features: np.ndarray) -> np.ndarray:
        """[N, classes it was fitted to], in rising order of their labels."""
        scores: np.ndarray = self._model.decision_function(features)
        if scores.ndim == 1:  # of two classes it gives the second alone
            scores = np.stack([-scores, scores], axis=1)
        return scores


def mean_per_class(hits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes in ``labels`` of the share of hits, in percent: small classes count like large ones."""
    return float(100.0 * np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def split_held_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to fit to, and of those held out: the first of a random order (torch's, as published).

    Raises:
        ValueError: if either would be empty.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    num_held_out = int(len(labels) * share)
    if not 0 < num_held_out < len(labels):
        raise ValueError(
            f"Logistic regression: of {len(labels)} training images a share of {share} is {num_held_out}, so C cannot be "
            "chosen; give a validation set in TEST.LOGREG.VAL, or another TEST.LOGREG.HELD_OUT."
        )
    return order[num_held_out:], order[:num_held_out]


class Choice(NamedTuple):
    """The best C, its solution on the images it was chosen by, and how many fits on the way did not converge."""

    c: float
    regression: Regression
    num_unconverged: int


class _Fit(NamedTuple):
    c: float
    accuracy: float
    num_unconverged: int


def choose_c(fit: Rows, judge: Rows, settings: LogregSettings) -> Choice:
    """The C whose regression on ``fit`` is right most often on ``judge``; of equal ones the smallest.

    The processes share the values of C; all must call it with the same rows.
    """
    chains = [settings.cs[i : i + CHAIN] for i in range(0, len(settings.cs), CHAIN)]
    world_size = comm.get_world_size()
    mine = [c for chain in chains[comm.get_rank() :: world_size] for c in chain]
    regression = Regression(settings)
    best: tuple[_Fit, int] | None = None  # and the rank that has its solution
    solution = regression
    fits: list[_Fit] = []

    def fit_one(turn: int) -> _Fit | None:
        if turn >= len(mine):
            return None
        before = regression.num_unconverged
        regression.fit(fit, mine[turn])
        accuracy = float(regression.hits(judge, 1).mean())
        return _Fit(mine[turn], accuracy, regression.num_unconverged - before)

    for turn in range(math.ceil(len(chains) / world_size) * CHAIN):
        if turn % CHAIN == 0:
            regression = Regression(settings)
        for rank, found in enumerate(comm.gather_results(functools.partial(fit_one, turn))):
            if found is None:
                continue
            fits.append(found)
            if best is None or (found.accuracy, -found.c) > (best[0].accuracy, -best[0].c):
                best = found, rank
                if rank == comm.get_rank():
                    solution = regression.copy()
        message = f"Logistic regression: {len(fits)} of {len(settings.cs)} values of C"
        log_every_n_seconds(logging.INFO, message, 30, name=__name__, key="progress")
    assert best is not None, "there are values of C"
    c, accuracy, _ = best[0]
    logger.info("Logistic regression: C %.3g is right on %.2f %% of the held-out images.", c, 100 * accuracy)
    return Choice(c, comm.broadcast_object(solution, src=best[1]), sum(found.num_unconverged for found in fits))


def warn_of_fits(settings: LogregSettings, c: float, num_unconverged: int, num_fits: int) -> None:
    """Warn if the C that was chosen is at the end of the grid, or fits did not converge."""
    if c == max(settings.cs):
        logger.warning("Logistic regression: C %.3g is the largest of TEST.LOGREG; a larger may be better.", c)
    if num_unconverged:
        logger.warning(
            "Logistic regression: %d of %d fits did not converge (TEST.LOGREG.MAX_LBFGS_ITERS %d, TEST.LOGREG.TOL %g).",
            num_unconverged,
            num_fits,
            settings.max_iter,
            settings.tol,
        )


class LogregEvaluator(DatasetEvaluator):
    """``{"logreg": {"top1": ..., "top5": ..., "mean_per_class": ...}}`` in percent; top-5 with more than five classes."""

    def __init__(
        self,
        train_loader: Any,
        settings: LogregSettings,
        *,
        class_names: Sequence[str],
        train_labels: Sequence[int],
        val_loader: Any = None,
        val_labels: Sequence[int] = (),
        test_set: ImageDataset | None = None,
    ) -> None:
        """
        Args:
            train_loader, val_loader: ImageBatch of this rank's part; without ``val_loader`` C is chosen on a part of the
                training set.
            class_names: by label of the test set.
            train_labels, val_labels: what each label of those sets is called in the test set.
            test_set: names its images in messages.
        """
        self.train_loader = train_loader
        self.settings = settings
        self.class_names = class_names
        self.train_labels = train_labels
        self.val_loader = val_loader
        self.val_labels = val_labels
        self._num_train_images, self._num_val_images = 0, 0
        self._train: Rows | None = None
        self._val: Rows | None = None
        self.test_set = test_set
        self._test = FeatureCollector(test_set)

    def prepare(self, model: nn.Module) -> None:
        train = extract_features(model, self.train_loader).relabelled(self.train_labels)
        self._train = self._rows(train)
        self._num_train_images = len(train)
        if self.val_loader is not None:
            self._val = self._rows(extract_features(model, self.val_loader).relabelled(self.val_labels))
            self._num_val_images = len(self._val.labels)

    def _rows(self, features: Features) -> Rows:
        assert features.labels is not None, "match_label_sets saw labels"
        return Rows(features.features.numpy().astype(self.settings.dtype), features.labels.numpy())

    def reset(self) -> None:
        self._test = FeatureCollector(self.test_set)

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        self._test.add(output.cls_token, batch.labels, batch.indices)

    def evaluate(self) -> Results | None:
        """
        Raises:
            ValueError: if there are images of one class only to fit to, or none to hold out.
        """
        test = self._rows(self._test.finish())
        assert self._train is not None, "prepare() comes before evaluate()"
        fit, judge, everything = self._split(self._train)
        choice = choose_c(fit, judge, self.settings)
        self._train, self._val = None, None  # of the weights as they were; the next call has others
        # Rank 0 fits and answers; the others hear from it, however long it takes.
        work = functools.partial(self._answer, choice, everything, test)
        return comm.gather_results(work if comm.is_main_process() else lambda: None)[0]

    def _answer(self, choice: Choice, everything: Rows, test: Rows) -> Results:
        """The last fit and what it says of the test set."""
        # From the solution that C was chosen by, which is near that of a tenth more images.
        regression = choice.regression if choice.regression.has_classes_of(everything) else Regression(self.settings)
        before = regression.num_unconverged
        regression.fit(everything, choice.c)
        num_unconverged = choice.num_unconverged + regression.num_unconverged - before
        warn_of_fits(self.settings, choice.c, num_unconverged, len(self.settings.cs) + 1)
        hits = {f"top{k}": regression.hits(test, k) for k in tops_of(len(self.class_names))}
        results = {name: float(100.0 * found.mean()) for name, found in hits.items()}
        return {"logreg": {**results, "mean_per_class": mean_per_class(hits["top1"], test.labels)}}

    def _split(self, train: Rows) -> tuple[Rows, Rows, Rows]:
        """What C is chosen by: rows to fit to and rows to judge by; and the rows of the last fit."""
        if self._val is not None:
            fit, judge = train, self._val
            everything = Rows(*(np.concatenate(parts) for parts in zip(train, self._val, strict=True)))
        else:
            keep, held_out = split_held_out(train.labels, self.settings.held_out, self.settings.seed)
            fit, judge = Rows(*(part[keep] for part in train)), Rows(*(part[held_out] for part in train))
            everything = train
        classes = np.unique(fit.labels)
        if len(classes) < 2:
            raise ValueError(
                "Logistic regression needs images of two classes or more to fit to, and there are only images of "
                f"{[self.class_names[label] for label in classes]} (of {len(train.labels)} training images)."
            )
        if lost := [self.class_names[label] for label in np.setdiff1d(everything.labels, classes)]:
            logger.warning(
                "Logistic regression: all images of %d class(es) are held out while C is chosen, e.g. of %s; the last fit "
                "has them.",
                len(lost),
                ", ".join(lost[:8]),
            )
        return fit, judge, everything

    def protocol(self) -> dict[str, Any]:
        images = {"num_train_images": self._num_train_images, "num_val_images": self._num_val_images}
        return {"logreg": {**images, **self.settings.protocol(by_share=self.val_loader is None)}}


def build_single_label_logreg(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.LOGREG; trained on TEST.LOGREG.TRAIN, or the training set of TEST.TRAIN_PER_TEST or DATASETS.TRAIN.

    Raises:
        ValueError: if a dataset has no labels, or sets share no class; better now than after the training.
    """
    logreg = cfg.TEST.LOGREG
    sets = match_label_sets(cfg, "logreg", logreg.TRAIN, dataset, make_loader)
    number = {name: label for label, name in enumerate(sets.class_names)}
    val_loader, val_labels = None, []
    if logreg.VAL:
        val_loader = make_loader(cfg, logreg.VAL)
        val = match_label_sets(cfg, "logreg", sets.train_strings, logreg.VAL, make_loader, "validation set")
        val_labels = [number.setdefault(name, len(number)) for name in val.class_names]
    return LogregEvaluator(
        sets.train_loader,
        LogregSettings.from_config(cfg),
        class_names=list(number),
        train_labels=sets.train_labels,
        val_loader=val_loader,
        val_labels=val_labels,
        test_set=dataset_of(make_loader(cfg, dataset)),
    )
