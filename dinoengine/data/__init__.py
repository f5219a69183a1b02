from dinoengine.data.augmentation import AUGMENTATION_REGISTRY, CenterCropTransform, MultiCrop
from dinoengine.data.build import build_mask_train_loader, build_test_loader, build_train_loader
from dinoengine.data.catalog import (
    DATASET_REGISTRY,
    DatasetCatalog,
    MetadataCatalog,
    build_dataset,
    build_datasets,
)
from dinoengine.data.dataset import ConcatImageDataset, DataError, ImageDataset, require_labels
from dinoengine.data.datasets import (
    VOC2007,
    Digits,
    FashionMNIST,
    FileList,
    HuggingFaceDataset,
    ImageFolder,
    ImageNet,
    ImageNet22k,
    MaskFolder,
    Synthetic,
    TorchvisionDataset,
    WebDataset,
)
from dinoengine.data.decode import UnreadableImageError
from dinoengine.data.decoded_batch import DecodedBatch
from dinoengine.data.describe import TensorRow, describe_batch
from dinoengine.data.masking import BlockMasking, MaskPlan
from dinoengine.data.samplers import InferenceSampler, MixtureSampler, PositionBatches, TrainingSampler
from dinoengine.data.single_crop import SingleCrop
from dinoengine.data.streams import LabelledStream, TrainingStream
from dinoengine.data.uneven_samplers import ClassBalancedSampler, WeightedSampler

__all__ = [
    "AUGMENTATION_REGISTRY",
    "DATASET_REGISTRY",
    "VOC2007",
    "BlockMasking",
    "CenterCropTransform",
    "ClassBalancedSampler",
    "ConcatImageDataset",
    "DataError",
    "DatasetCatalog",
    "DecodedBatch",
    "Digits",
    "FashionMNIST",
    "FileList",
    "HuggingFaceDataset",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "ImageNet22k",
    "InferenceSampler",
    "LabelledStream",
    "MaskFolder",
    "MaskPlan",
    "MetadataCatalog",
    "MixtureSampler",
    "MultiCrop",
    "PositionBatches",
    "SingleCrop",
    "Synthetic",
    "TensorRow",
    "TorchvisionDataset",
    "TrainingSampler",
    "TrainingStream",
    "UnreadableImageError",
    "WebDataset",
    "WeightedSampler",
    "build_dataset",
    "build_datasets",
    "build_mask_train_loader",
    "build_test_loader",
    "build_train_loader",
    "describe_batch",
    "require_labels",
]
