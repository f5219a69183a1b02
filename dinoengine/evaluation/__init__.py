from dinoengine.evaluation.baselines import pixel_knn_accuracy
from dinoengine.evaluation.build import EVALUATOR_REGISTRY, build_evaluator
from dinoengine.evaluation.classification import ClassificationEvaluator
from dinoengine.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from dinoengine.evaluation.extraction import Extraction, extract_to_store
from dinoengine.evaluation.feature_store import FeatureStore
from dinoengine.evaluation.features import FeatureCollector, Features, extract_features, extract_pixels
from dinoengine.evaluation.knn import KNNEvaluator, knn_accuracy, knn_scores
from dinoengine.evaluation.label_sets import LabelSets, labels_by_name, match_label_sets, shared_images
from dinoengine.evaluation.neighbours import Neighbours, NeighbourSearch
from dinoengine.evaluation.records import differences, make_record, save_record, weights_sha256
from dinoengine.evaluation.testing import flatten_results_dict, print_csv_format, results_table, verify_results

__all__ = [
    "EVALUATOR_REGISTRY",
    "ClassificationEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "Extraction",
    "FeatureCollector",
    "FeatureStore",
    "Features",
    "KNNEvaluator",
    "LabelSets",
    "NeighbourSearch",
    "Neighbours",
    "build_evaluator",
    "differences",
    "extract_features",
    "extract_pixels",
    "extract_to_store",
    "flatten_results_dict",
    "inference_context",
    "inference_on_dataset",
    "knn_accuracy",
    "knn_scores",
    "labels_by_name",
    "make_record",
    "match_label_sets",
    "pixel_knn_accuracy",
    "print_csv_format",
    "results_table",
    "save_record",
    "shared_images",
    "verify_results",
    "weights_sha256",
]
