from dinoengine.checkpoint.backbone import evaluation_config, feature_model, load_backbone
from dinoengine.checkpoint.checkpointer import Checkpointer
from dinoengine.checkpoint.files import CheckpointError
from dinoengine.checkpoint.reading import read_checkpoint
from dinoengine.checkpoint.resuming import periodic_checkpoints, resumable
from dinoengine.checkpoint.writing import CheckpointWriteError

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "Checkpointer",
    "evaluation_config",
    "feature_model",
    "load_backbone",
    "periodic_checkpoints",
    "read_checkpoint",
    "resumable",
]
