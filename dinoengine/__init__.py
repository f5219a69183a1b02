"""dinoengine: a detectron2-style engine for self-supervised pretraining of vision transformers."""

__version__ = "0.1.0"
