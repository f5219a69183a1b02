"""The trainer of image classifiers, and which trainer a config asks for."""

from __future__ import annotations

from dinoengine.config import CfgNode
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.reporting import ReportingTrainer
from dinoengine.engine.ssl_trainer import SSLTrainer


class ClassifierTrainer(ReportingTrainer):
    """Linear evaluation or fine-tuning with labels: DefaultTrainer and the final results table."""

    model_name = "classifier"


def trainer_class_of(cfg: CfgNode) -> type[DefaultTrainer]:
    """ClassifierTrainer if MODEL.CLASSIFIER.NUM_CLASSES is above 0, else SSLTrainer."""
    return ClassifierTrainer if cfg.MODEL.CLASSIFIER.NUM_CLASSES else SSLTrainer
