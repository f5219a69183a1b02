from dinoengine.checkpoint.backbone import evaluation_config, feature_model, load_backbone
from dinoengine.checkpoint.checkpointer import Checkpointer, periodic_checkpoints
from dinoengine.checkpoint.files import CheckpointError, read_checkpoint

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "evaluation_config",
    "feature_model",
    "load_backbone",
    "periodic_checkpoints",
    "read_checkpoint",
]
