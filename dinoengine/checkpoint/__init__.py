from dinoengine.checkpoint.checkpointer import Checkpointer, CheckpointError, periodic_checkpoints, read_checkpoint

__all__ = ["CheckpointError", "Checkpointer", "periodic_checkpoints", "read_checkpoint"]
