from dinoengine.checkpoint.checkpointer import Checkpointer, periodic_checkpoints
from dinoengine.checkpoint.files import CheckpointError, read_checkpoint

__all__ = ["CheckpointError", "Checkpointer", "periodic_checkpoints", "read_checkpoint"]
