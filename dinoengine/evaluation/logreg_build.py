"""The evaluator ``logreg``: for one class per image or for sets of classes, as the test set has them."""

from __future__ import annotations

from dinoengine.config import CfgNode
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, LoaderFactory
from dinoengine.evaluation.evaluator import DatasetEvaluator
from dinoengine.evaluation.logreg import build_single_label_logreg
from dinoengine.evaluation.logreg_multi_label import build_multi_label_logreg


@EVALUATOR_REGISTRY.register("logreg")
def build_logreg_evaluator(cfg: CfgNode, dataset: str, make_loader: LoaderFactory) -> DatasetEvaluator:
    """TEST.LOGREG; trained on TEST.LOGREG.TRAIN, or the training set of TEST.TRAIN_PER_TEST or DATASETS.TRAIN.

    Raises:
        ValueError: if a dataset has no labels or those of the other kind, or sets share no class; better now than after
            the training.
    """
    test_set = make_loader(cfg, dataset).dataset.dataset
    is_multi_label = test_set.multi_label_class_names is not None
    return (build_multi_label_logreg if is_multi_label else build_single_label_logreg)(cfg, dataset, make_loader)
