"""The shares of a sharded checkpoint as one ordinary file."""

from __future__ import annotations

import logging
import os

from dinoengine.checkpoint.files import CheckpointError
from dinoengine.checkpoint.output import require_free
from dinoengine.checkpoint.reading import read_checkpoint
from dinoengine.checkpoint.sharded import MANIFEST, is_sharded_checkpoint, read_sharded
from dinoengine.checkpoint.writing import num_bytes, write_file

logger = logging.getLogger(__name__)


def consolidate(source: str, target: str, *, overwrite: bool = False) -> None:
    """Write everything in the folder ``source`` (weights, moments, hooks, iteration) into the file ``target``.

    Every file of ``source`` is compared with its manifest, and ``target`` is read back. Needs CPU memory for the whole.

    Raises:
        CheckpointError: if ``source`` is no sharded checkpoint or is damaged, or ``target`` is there already.
    """
    if not os.path.exists(source):
        raise FileNotFoundError(f"Checkpoint {source} does not exist; expected a folder of a run, model_*.dcp.")
    if not is_sharded_checkpoint(source):
        raise CheckpointError(
            f"{source} is no whole sharded checkpoint; expected a folder as MODEL.PARALLEL fsdp writes it (model_*.dcp), "
            f"with its {MANIFEST}, which is written last."
        )
    require_free(target, overwrite, source)
    data = read_sharded(source)
    write_file(target, data)
    read_checkpoint(target)  # compares the digest with what is on disk
    logger.info("%s: %.1f MiB, iteration %s.", target, num_bytes(data) / 2**20, data.get("iteration"))
