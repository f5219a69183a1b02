from dinoengine.modeling.heads.build import HEAD_REGISTRY, build_head
from dinoengine.modeling.heads.dino_head import DINOHead

__all__ = ["HEAD_REGISTRY", "DINOHead", "build_head"]
