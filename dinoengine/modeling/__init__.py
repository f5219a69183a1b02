from dinoengine.modeling.backbone import BACKBONE_REGISTRY, Backbone, VisionTransformer, build_backbone
from dinoengine.modeling.build import META_ARCH_REGISTRY, build_model
from dinoengine.modeling.heads import HEAD_REGISTRY, DINOHead, build_head
from dinoengine.modeling.meta_arch import (
    DINOv2,
    FeatureModel,
    ImageClassifier,
    StudentTeacher,
    head_input,
    last_outputs,
)

__all__ = [
    "BACKBONE_REGISTRY",
    "HEAD_REGISTRY",
    "META_ARCH_REGISTRY",
    "Backbone",
    "DINOHead",
    "DINOv2",
    "FeatureModel",
    "ImageClassifier",
    "StudentTeacher",
    "VisionTransformer",
    "build_backbone",
    "build_head",
    "build_model",
    "head_input",
    "last_outputs",
]
