from dinoengine.modeling.meta_arch.classifier import (
    ClassifierFeatureModel,
    ImageClassifier,
    head_input,
    last_outputs,
)
from dinoengine.modeling.meta_arch.dinov2 import DINOv2, TeacherTargets
from dinoengine.modeling.meta_arch.feature_model import FeatureModel, PrototypeHead
from dinoengine.modeling.meta_arch.student_teacher import StudentTeacher

__all__ = [
    "ClassifierFeatureModel",
    "DINOv2",
    "FeatureModel",
    "ImageClassifier",
    "PrototypeHead",
    "StudentTeacher",
    "TeacherTargets",
    "head_input",
    "last_outputs",
]
