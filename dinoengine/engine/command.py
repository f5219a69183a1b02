"""The everyday command, ``tools/train_net.py``: train or evaluate from a config, in as many processes as asked for."""

from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from dinoengine.checkpoint import CheckpointWriteError
from dinoengine.config import CfgNode, ConfigError
from dinoengine.data import DataError
from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.classifier_trainer import trainer_class_of
from dinoengine.engine.config_loading import load_config
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.evaluation_weights import load_weights_for_evaluation
from dinoengine.engine.hooks import CallbackHook, CollapseError, TimeBudget
from dinoengine.engine.launch import launch
from dinoengine.engine.run_lock import RunInUseError, RunLock
from dinoengine.engine.setup import check_output_dir, default_setup, save_config
from dinoengine.engine.user_errors import exit_on_user_error
from dinoengine.utils import comm
from dinoengine.utils.logger import setup_logger
from dinoengine.utils.stop_signals import EXIT_PAUSED, end_when_asked

logger = logging.getLogger(__name__)


def run_command(
    trainer_class: type[DefaultTrainer] | None = None,
    argv: Sequence[str] | None = None,
    *,
    prepare: Callable[[DefaultTrainer], None] | None = None,
) -> Any:
    """Parse the command line, start the processes, train or evaluate.

    Args:
        trainer_class: your subclass; importable, as spawned processes import it. None: the one that the config asks for
            (``trainer_class_of``).
        argv: words of the command line; None: those of this process.
        prepare: called with the trainer of each process before it loads its checkpoint, e.g. to register hooks;
            importable as well.

    Returns:
        The results, when there is one process; None when processes were spawned.

    Raises:
        SystemExit: with EXIT_PAUSED when the run paused, 2 for wrong input.
    """
    args = default_argument_parser().parse_args(argv)
    with exit_on_user_error():
        cfg = load_config(args)
    where = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    return launch(
        train_or_evaluate,
        *where,
        args=(cfg, args, trainer_class, prepare),
        device=cfg.MODEL.DEVICE,
        timeout=timedelta(seconds=args.dist_timeout),
    )


def train_or_evaluate(
    cfg: CfgNode,
    args: argparse.Namespace,
    trainer_class: type[DefaultTrainer] | None = None,
    prepare: Callable[[DefaultTrainer], None] | None = None,
) -> dict[str, Any]:
    """What each process of a run does. A training holds the lock of its OUTPUT_DIR until it ends."""
    setup_logger(distributed_rank=comm.get_rank())
    end_when_asked()
    lock = RunLock(cfg.OUTPUT_DIR)

    def take_lock() -> str:
        check_output_dir(cfg.OUTPUT_DIR, new_run=False)
        return lock.acquire()

    try:
        with exit_on_user_error():
            took_over = "" if args.eval_only else comm.on_main_process(take_lock)
            cfg = default_setup(cfg, args)
        if took_over:
            logger.warning(took_over)
        return (
            _evaluate(cfg, args, trainer_class) if args.eval_only else _train(cfg, args, lock, trainer_class, prepare)
        )
    finally:
        lock.release()


def _keep_output_dir(lock: RunLock, cfg: CfgNode) -> None:
    """Before a checkpoint is written: the folder is still this run's; one that was removed gets its config again."""
    if lock.keep():
        save_config(cfg)


def _evaluate(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[DefaultTrainer] | None) -> dict[str, Any]:
    trainer_class = trainer_class or trainer_class_of(cfg)
    with exit_on_user_error():
        trainer_class.check_evaluation(cfg)  # before a large model is built and its weights are read
        model = trainer_class.build_model(cfg)
        weights = load_weights_for_evaluation(cfg, model, resume=args.resume)
        results = trainer_class.test(cfg, model)
        trainer_class.report(cfg, results, weights)
        trainer_class.check_expected_results(cfg, results)
    return results


def _train(
    cfg: CfgNode,
    args: argparse.Namespace,
    lock: RunLock,
    trainer_class: type[DefaultTrainer] | None,
    prepare: Callable[[DefaultTrainer], None] | None,
) -> dict[str, Any]:
    trainer_class = trainer_class or trainer_class_of(cfg)
    seconds_before = {"imports": args.seconds_before, "setup": time.monotonic() - args.started}
    with exit_on_user_error():
        trainer = trainer_class(cfg)
        trainer.startup.put_first(seconds_before)
        if prepare is not None:
            prepare(trainer)
        trainer.checkpointer.before_save = functools.partial(_keep_output_dir, lock, cfg)
        trainer.resume_or_load(resume=args.resume, fork_from=args.fork_from)
    if args.resume:  # a finished run keeps the config it had
        trainer.register_hooks([CallbackHook(before_train=lambda _: comm.on_main_process(lambda: save_config(cfg)))])
    if args.time_budget:
        trainer.register_hooks([TimeBudget(args.started + args.time_budget, "--time-budget")])
    expected = (DataError, ConfigError, CollapseError, CheckpointWriteError, RunInUseError, FloatingPointError)
    with exit_on_user_error(*expected):
        results = trainer.train()
    if trainer.pause_reason:
        logger.info("The run is not finished; --resume goes on with it (exit code %d).", EXIT_PAUSED)
        raise SystemExit(EXIT_PAUSED)
    return results
