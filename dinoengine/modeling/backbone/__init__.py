from dinoengine.modeling.backbone.backbone import Backbone
from dinoengine.modeling.backbone.build import BACKBONE_REGISTRY, build_backbone
from dinoengine.modeling.backbone.vit import VIT_SIZES, Execution, VisionTransformer

__all__ = ["BACKBONE_REGISTRY", "VIT_SIZES", "Backbone", "Execution", "VisionTransformer", "build_backbone"]
