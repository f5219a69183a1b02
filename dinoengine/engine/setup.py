"""Preparing a process of a run: output folder, log, config.yaml, seed, backends."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from dinoengine.config import CfgNode, ConfigError
from dinoengine.engine.precision import resolve_precision
from dinoengine.engine.resuming import CONFIG_FILE, checkpoint_to_fork, saved_config, traces_of_a_run
from dinoengine.utils import comm
from dinoengine.utils.env import collect_env_info, seed_all_rng
from dinoengine.utils.file_writing import atomic_write
from dinoengine.utils.logger import setup_logger

logger = logging.getLogger(__name__)


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """Prepare a process: output folder, log, environment report, config.yaml, seed, backends.

    When a run is resumed ``config.yaml`` stays as it is: call ``save_config`` once training begins.

    Returns:
        The config with SEED drawn where it was -1, and SOLVER.AMP.PRECISION measured where it was "auto".

    Raises:
        ConfigError: if OUTPUT_DIR cannot be written, or holds a run and neither --resume nor --eval-only is given.
    """
    rank = comm.get_rank()
    comm.on_main_process(lambda: check_output_dir(cfg.OUTPUT_DIR, new_run=not (args.resume or args.eval_only)))
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    earlier = functools.partial(_earlier_configs, cfg.OUTPUT_DIR if args.resume else "", args.fork_from)
    cfg = _with_seed(cfg, earlier)
    set_backends(cfg, training=not args.eval_only)
    if not args.eval_only:
        cfg = resolve_precision(cfg, earlier)
    logger.info("Rank %d of %d process(es) on %s.", rank, comm.get_world_size(), cfg.MODEL.DEVICE)
    logger.debug("Environment:\n%s", collect_env_info())
    logger.debug("Command line: %s", args)
    logger.debug("Full config:\n%s", cfg.dump())
    if not (args.resume or args.eval_only):
        save_config(cfg)
    seed_all_rng(cfg.SEED)
    return cfg


def set_backends(cfg: CfgNode, *, training: bool) -> None:
    """FLOAT32_PRECISION, CUDNN_BENCHMARK (in training alone) and DETERMINISTIC, for this process."""
    torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and training and not cfg.DETERMINISTIC
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def save_config(cfg: CfgNode) -> None:
    """Write ``OUTPUT_DIR/config.yaml`` (rank 0), which alone reproduces the run, also on another machine.

    MODEL.DEVICE is written as "auto" where that means the device of this run; a file that said "cuda" could not be used
    on a laptop, and one that said "cpu" would not use the GPU of another machine.
    """
    if not comm.is_main_process():
        return
    portable = cfg.clone()
    portable.defrost()
    if ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE:
        portable.MODEL.DEVICE = "auto"
    path = os.path.join(cfg.OUTPUT_DIR, CONFIG_FILE)
    with atomic_write(path, "w") as file:
        file.write(portable.dump())
    logger.info("Full config in %s", path)


def check_output_dir(output_dir: str, *, new_run: bool) -> None:
    """Make OUTPUT_DIR and see that it can be written and that no run would be overwritten."""
    if not output_dir:
        raise ConfigError("OUTPUT_DIR", ["is empty; name a folder for checkpoints and logs."])
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ConfigError("OUTPUT_DIR", [f"{output_dir} is a file; name a folder for checkpoints and logs."])
    try:
        os.makedirs(output_dir, exist_ok=True)
        probe = os.path.join(output_dir, ".writable")
        with open(probe, "w", encoding="utf-8"):
            pass
        os.remove(probe)
    except OSError as error:
        raise ConfigError(
            "OUTPUT_DIR", [f"{output_dir} cannot be written ({error.strerror}); choose another."]
        ) from None
    if new_run and (traces := traces_of_a_run(output_dir)):
        raise ConfigError(
            "OUTPUT_DIR",
            [
                f"{output_dir} already holds a run ({', '.join(traces)}). Continue it with --resume, choose another "
                "OUTPUT_DIR, or remove that folder."
            ],
        )


def _with_seed(cfg: CfgNode, earlier: Callable[[], list[dict[str, Any]]]) -> CfgNode:
    """SEED -1 becomes the seed of the run to be resumed or forked, or a new one, the same on every rank."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    seeds = (config.get("SEED") for config in comm.on_main_process(earlier))
    saved_seed = next((seed for seed in seeds if isinstance(seed, int)), None)
    cfg.SEED = comm.shared_random_seed() if saved_seed is None else saved_seed
    logger.info("SEED is -1; this run uses %d.", cfg.SEED)
    cfg.freeze()
    return cfg


def _earlier_configs(output_dir: str, fork_from: str) -> list[dict[str, Any]]:
    """Saved values of the run to be resumed, then of the one to be forked."""
    folders = [output_dir] if output_dir else []
    folders += [os.path.dirname(checkpoint_to_fork(fork_from))] if fork_from else []
    return [config for folder in folders if (config := saved_config(folder))]
