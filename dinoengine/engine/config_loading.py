"""From parsed flags to a config that is complete, checked and frozen."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from dataclasses import replace

import torch

from dinoengine.checkpoint import CheckpointError, resumable
from dinoengine.checkpoint.adopt import fit_config, hints_of_config, require_same_backbone, say_assumed_heads
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.reading import read_content
from dinoengine.checkpoint.weights import Weights
from dinoengine.config import CfgNode, ConfigError, key_origins, read_cfg, validate
from dinoengine.config.config import flatten
from dinoengine.engine.arguments import FLAGS_FOR_KEYS
from dinoengine.engine.resuming import checkpoint_to_fork, saved_config
from dinoengine.engine.torchrun import process_rank, require_whole_environment, under_torchrun
from dinoengine.evaluation import check_evaluator_names
from dinoengine.modeling import VisionTransformer
from dinoengine.solver import scale_config_to_world_size
from dinoengine.utils.logger import setup_logger

logger = logging.getLogger(__name__)


def load_config(args: argparse.Namespace) -> CfgNode:
    """Merge config file and overrides, decide device and number of processes, check everything, freeze.

    Sets ``args.num_gpus`` to the number of processes on this machine.

    Raises:
        ConfigError: names every problem.
        ValueError: if the environment has a part of what torchrun sets.
    """
    require_whole_environment()
    setup_logger(distributed_rank=process_rank())
    cfg = read_cfg(args.config_file, args.opts)
    _merge_flags(cfg, args)
    if args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            "--num-machines",
            [
                f"must be 1 or more, and --machine-rank from 0 below it; got {args.num_machines} and {args.machine_rank}."
            ],
        )
    if args.num_machines > 1 and args.dist_url in (None, "auto") and not under_torchrun():
        raise ConfigError(
            "--dist-url",
            ["several machines need it: tcp://<address of the first machine>:<free port>, the same on each of them."],
        )
    if args.fork_from and args.eval_only:
        raise ConfigError("--fork-from", ["starts a training; with --eval-only name the weights in MODEL.WEIGHTS."])
    fit_config_to_weights(cfg, resume=args.resume, fork_from=args.fork_from)
    cfg.MODEL.DEVICE, args.num_gpus = resolve_device(cfg.MODEL.DEVICE, args.num_gpus)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else args.num_gpus * args.num_machines
    for warning in validate(scale_config_to_world_size(cfg, world_size), world_size, training=not args.eval_only):
        logger.warning(warning)
    check_evaluator_names(cfg)
    cfg.freeze()
    return cfg


def _merge_flags(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set the keys that flags stand for.

    Raises:
        ConfigError: if a flag and an override say different things.
    """
    origins = key_origins(cfg, overrides=args.opts)
    for flag, key in FLAGS_FOR_KEYS.items():
        value = getattr(args, flag.replace("-", "_"))
        if value is None:
            continue
        said = dict(flatten(cfg))[key]
        if origins[key] == "command line" and said != value:
            raise ConfigError(
                f"--{flag}", [f"{value} and the override {key} {said} are one setting; give one of them."]
            )
        cfg.merge_from_list([key, value])


def fit_config_to_weights(cfg: CfgNode, *, resume: bool = False, fork_from: str = "") -> None:
    """Set what the weights decide (see ``checkpoint.adopt.fit_config``); a run that goes on has it in its config.yaml.

    Raises:
        FileNotFoundError, CheckpointError: if MODEL.WEIGHTS cannot be read, or there is nothing to fork from. A layout that
            is not known is left to loading: it may be a checkpoint of this very model.
        ConfigError: if the config builds another backbone than that of MODEL.WEIGHTS; gives the values to set.
    """
    is_resumed = resume and bool(resumable(cfg.OUTPUT_DIR))
    goes_on_from = cfg.OUTPUT_DIR if is_resumed else ""
    if fork_from and not is_resumed:
        goes_on_from = os.path.dirname(checkpoint_to_fork(fork_from))
    if cfg.MODEL.BACKBONE.NAME != "VisionTransformer":
        if cfg.MODEL.WEIGHTS and not goes_on_from:
            read_content(cfg.MODEL.WEIGHTS)
    elif goes_on_from:
        with contextlib.suppress(ConfigError):  # the checkpoint has a config too, and says what does not fit
            vit = ((saved_config(goes_on_from) or {}).get("MODEL") or {}).get("VIT") or {}
            for key in ("POS_EMBED_SIZE_PX", "INTERPOLATE_ANTIALIAS", "INTERPOLATE_OFFSET"):
                if key in vit:
                    cfg.merge_from_list([f"MODEL.VIT.{key}", vit[key]])
    elif cfg.MODEL.WEIGHTS:
        setup_logger(distributed_rank=process_rank())
        try:
            weights = _read_as_configured(cfg)
            fit_config(cfg, weights, cfg.MODEL.WEIGHTS)
            say_assumed_heads(weights, cfg.MODEL.WEIGHTS)
            if cfg.MODEL.WEIGHTS_STRICT:
                require_same_backbone(cfg, weights, cfg.MODEL.WEIGHTS)
        except (CheckpointError, OSError):
            read_content(cfg.MODEL.WEIGHTS)


def _read_as_configured(cfg: CfgNode) -> Weights:
    """MODEL.WEIGHTS; what the file does not say is taken from the config, if that is of the same model."""
    hints = hints_of_config(cfg)
    with contextlib.suppress(CheckpointError):
        weights = read_weights(cfg.MODEL.WEIGHTS, hints=hints)
        if weights.spec.embed_dim == VisionTransformer.from_config(cfg)["embed_dim"]:
            return weights
    # Another model than the config's: its number of heads says nothing about the file.
    return read_weights(cfg.MODEL.WEIGHTS, hints=replace(hints, num_heads=None))


def resolve_device(device: str, num_gpus: int | None) -> tuple[str, int]:
    """("cpu" or "cuda", processes on this machine) for MODEL.DEVICE and --num-gpus.

    Raises:
        ConfigError: if they contradict each other, or ask for GPUs that are not there.
    """
    visible = torch.cuda.device_count()
    if num_gpus is not None and num_gpus < 0:
        raise ConfigError("--num-gpus", [f"must be 0 or more, got {num_gpus}."])
    if device == "cpu":
        return "cpu", num_gpus or 1
    if device == "cuda" and num_gpus == 0:
        raise ConfigError("--num-gpus", ["0 means the CPU, but MODEL.DEVICE is cuda; give one of them up."])
    wanted = num_gpus if num_gpus is not None else (1 if device == "cuda" or visible else 0)
    if wanted > visible:
        raise ConfigError(
            "--num-gpus",
            [
                f"{wanted} asked for, but {visible} GPU(s) are visible to torch. Use --num-gpus {visible}, or set "
                f"MODEL.DEVICE cpu for {wanted} process(es) on the CPU."
            ],
        )
    return ("cuda", wanted) if wanted else ("cpu", 1)
