"""What a run goes on from: its own last checkpoint, with a config that fits it, or the full state of another run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointError
from dinoengine.checkpoint.resuming import FINAL, POINTER, checkpoint_name, endings_of
from dinoengine.checkpoint.sharded import is_sharded_checkpoint
from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.config.resume_rules import (
    FREE,
    Change,
    changes_table,
    config_changes,
    require_resumable,
    values_of_text,
)
from dinoengine.utils import comm
from dinoengine.utils.file_writing import atomic_write
from dinoengine.utils.writers import METRICS_FILE

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
FORK_FILE = "fork.json"


def traces_of_a_run(output_dir: str) -> list[str]:
    """Names of the files in a folder that only a run leaves there once it trains."""
    names = [POINTER, *endings_of(FINAL), METRICS_FILE]
    return [n for n in names if os.path.exists(p := os.path.join(output_dir, n)) and os.path.getsize(p)]


def warn_of_lost_checkpoints(output_dir: str) -> None:
    """For a resumed run that has no checkpoint; a folder that no run has written into is nothing to speak of."""
    if traces := traces_of_a_run(output_dir):
        logger.warning(
            "--resume: %s holds a run (%s) and no checkpoint: it ended before the first one, or they were removed. It "
            "starts again from the beginning, and what its logs hold of the iterations to come is dropped.",
            output_dir,
            ", ".join(traces),
        )


def saved_config(folder: str) -> dict[str, Any] | None:
    """Nested values of the ``config.yaml`` of a run, whatever keys it has; None if there is none.

    Raises:
        ConfigError: if it is no YAML of keys.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return values_of_text(file.read(), path)


def changes_since(cfg: CfgNode, data: dict[str, Any], path: str) -> list[Change]:
    """What ``cfg`` changes in the config of a checkpoint; that config is in the file, or in ``config.yaml`` beside it.

    Args:
        data: content of the checkpoint at ``path``.

    Raises:
        ConfigError: if there is no config, or one that cannot be read.
    """
    text = data.get("config")
    values = values_of_text(text, f"The config in {path}") if text else saved_config(os.path.dirname(path))
    if values is None:
        raise ConfigError(
            f"Checkpoint {path}",
            [
                f"has no config, and there is no {CONFIG_FILE} beside it, so it cannot be said what would change. Put "
                "the config of that run there, or start a new run from its weights with MODEL.WEIGHTS.",
            ],
        )
    return config_changes(values, cfg, get_cfg())


def check_before_resume(cfg: CfgNode) -> Callable[[dict[str, Any], str], None]:
    """For ``Checkpointer(before_load=)``: shows what ``cfg`` changes, and refuses what has no defined meaning.

    The function that is returned raises ConfigError.
    """

    def check(data: dict[str, Any], path: str) -> None:
        changes = changes_since(cfg, data, path)
        _show(changes, path)
        require_resumable(changes, path, os.path.dirname(path))

    return check


def _show(changes: list[Change], path: str) -> None:
    shown = [change for change in changes if change.key not in ("MODEL.DEVICE", "OUTPUT_DIR")]
    if shown and comm.is_main_process():
        level = logging.INFO if all(change.rule.kind == FREE for change in shown) else logging.WARNING
        logger.log(level, "What this config changes since %s:\n%s", path, changes_table(shown))


def checkpoint_to_fork(source: str) -> str:
    """The file that ``--fork-from`` means: ``source`` itself, or the last checkpoint of that run.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        CheckpointError: if the folder has no checkpoint.
    """
    source = source.rstrip(os.sep) or source  # a completed path of a folder of shards ends in one
    if os.path.isdir(source) and not is_sharded_checkpoint(source):
        path = Checkpointer(nn.Identity(), source).get_checkpoint_file()
        if not path:
            raise CheckpointError(f"--fork-from: {source} has no checkpoint (last_checkpoint) to start from.")
        return path
    if not os.path.exists(source):
        raise FileNotFoundError(
            f"--fork-from: {source} does not exist; expected the OUTPUT_DIR of a run, or one of its checkpoints."
        )
    return source


class ForkingTrainer(Protocol):
    """What ``fork_run`` needs of a trainer: its config, its model without wrappers, its state, and where it is saved."""

    cfg: CfgNode
    checkpointer: Checkpointer

    @property
    def bare_model(self) -> nn.Module: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fork_run(trainer: ForkingTrainer, source: str) -> int:
    """Take the full state of another run, and save it as the first checkpoint of this one; a collective operation.

    Any key may have changed; model, optimizer and hooks must still fit. From then on the fork is a run like any other.
    ``fork.json`` says where it comes from. What is known of the best checkpoint stays with the other run.

    Args:
        trainer: has not trained yet.
        source: see ``checkpoint_to_fork``.

    Returns:
        The iteration to start from.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: if there is nothing to start from or it does not fit.
    """
    path = comm.on_main_process(lambda: checkpoint_to_fork(source))
    changes: list[Change] = []

    def show(data: dict[str, Any], path: str) -> None:
        changes.extend(changes_since(trainer.cfg, data, path))
        _show(changes, path)

    unused = f"; MODEL.WEIGHTS {trainer.cfg.MODEL.WEIGHTS} is not used" if trainer.cfg.MODEL.WEIGHTS else ""
    logger.info("Forking from %s (--fork-from%s).", path, unused)
    reader = Checkpointer(trainer.bare_model, os.path.dirname(path), before_load=show, trainer=trainer)
    iteration = reader.load(path).get("iteration")
    if not isinstance(iteration, int):
        raise CheckpointError(
            f"--fork-from: {path} says no iteration, so it is no checkpoint of a run. To start a new run from its "
            "weights use MODEL.WEIGHTS."
        )
    output_dir = trainer.cfg.OUTPUT_DIR
    comm.on_main_process(lambda: _record_fork(output_dir, path, iteration, changes))
    trainer.checkpointer.save(checkpoint_name(iteration), required=True, iteration=iteration)
    return iteration + 1


def _record_fork(output_dir: str, path: str, iteration: int, changes: list[Change]) -> None:
    record = {
        "source": os.path.abspath(path),
        "iteration": iteration,
        "changes": {change.key: {"before": change.before, "now": change.now} for change in changes},
    }
    with atomic_write(os.path.join(output_dir, FORK_FILE), "w") as file:
        json.dump(record, file, indent=1, default=repr)


def require_no_unfinished_fork(output_dir: str) -> None:
    """For a run without a checkpoint.

    Raises:
        ConfigError: if it was to be a fork and ended before it had its first checkpoint.
    """
    path = os.path.join(output_dir, FORK_FILE)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            source = json.load(file)["source"]
        raise ConfigError(
            "--resume",
            [
                f"{output_dir} has no checkpoint yet, and was to be a fork of {source}. Give --fork-from {source} as well, "
                "so that it does not start from scratch."
            ],
        )
