from dinoengine.evaluation.average_precision import average_precision, eleven_point_average_precision
from dinoengine.evaluation.baselines import pixel_knn_accuracy
from dinoengine.evaluation.build import (
    EVALUATOR_REGISTRY,
    UnsuitableTestSetError,
    build_evaluator,
    check_evaluator_names,
)
from dinoengine.evaluation.classification import ClassificationEvaluator
from dinoengine.evaluation.confusion import ConfusionMatrix, iou_per_class, segmentation_scores
from dinoengine.evaluation.dense_knn import DenseKNNEvaluator
from dinoengine.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from dinoengine.evaluation.extraction import Extraction, extract_to_store
from dinoengine.evaluation.feature_store import FeatureStore
from dinoengine.evaluation.features import FeatureCollector, Features, extract_features, extract_pixels
from dinoengine.evaluation.knn import KNNEvaluator, KNNSettings, knn_accuracy, knn_scores
from dinoengine.evaluation.label_free import LabelFreeEvaluator, power_law_exponent, rankme
from dinoengine.evaluation.label_sets import LabelSets, labels_by_name, match_label_sets
from dinoengine.evaluation.linear import LinearEvaluator, ProbeSets
from dinoengine.evaluation.linear_heads import HeadGrid, LinearHeads
from dinoengine.evaluation.linear_settings import LinearSettings
from dinoengine.evaluation.logreg import LogregEvaluator, LogregSettings, mean_per_class
from dinoengine.evaluation.logreg_build import build_logreg_evaluator
from dinoengine.evaluation.logreg_multi_label import MultiLabelLogregEvaluator
from dinoengine.evaluation.mask_sets import MaskSets, match_mask_sets
from dinoengine.evaluation.moments import Moments
from dinoengine.evaluation.neighbours import Neighbours, NeighbourSearch
from dinoengine.evaluation.overlap import shared_images
from dinoengine.evaluation.patch_bank import PatchBank, patch_classes
from dinoengine.evaluation.records import differences, make_record, save_record, weights_sha256
from dinoengine.evaluation.segmentation import SegmentationEvaluator
from dinoengine.evaluation.segmentation_head import SegmentationHead
from dinoengine.evaluation.testing import flatten_results_dict, print_csv_format, results_tables, verify_results

__all__ = [
    "EVALUATOR_REGISTRY",
    "ClassificationEvaluator",
    "ConfusionMatrix",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "DenseKNNEvaluator",
    "Extraction",
    "FeatureCollector",
    "FeatureStore",
    "Features",
    "HeadGrid",
    "KNNEvaluator",
    "KNNSettings",
    "LabelFreeEvaluator",
    "LabelSets",
    "LinearEvaluator",
    "LinearHeads",
    "LinearSettings",
    "LogregEvaluator",
    "LogregSettings",
    "MaskSets",
    "Moments",
    "MultiLabelLogregEvaluator",
    "NeighbourSearch",
    "Neighbours",
    "PatchBank",
    "ProbeSets",
    "SegmentationEvaluator",
    "SegmentationHead",
    "UnsuitableTestSetError",
    "average_precision",
    "build_evaluator",
    "build_logreg_evaluator",
    "check_evaluator_names",
    "differences",
    "eleven_point_average_precision",
    "extract_features",
    "extract_pixels",
    "extract_to_store",
    "flatten_results_dict",
    "inference_context",
    "inference_on_dataset",
    "iou_per_class",
    "knn_accuracy",
    "knn_scores",
    "labels_by_name",
    "make_record",
    "match_label_sets",
    "match_mask_sets",
    "mean_per_class",
    "patch_classes",
    "pixel_knn_accuracy",
    "power_law_exponent",
    "print_csv_format",
    "rankme",
    "results_tables",
    "save_record",
    "segmentation_scores",
    "shared_images",
    "verify_results",
    "weights_sha256",
]
