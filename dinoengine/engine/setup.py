"""From the command line to a checked config and a prepared process."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dinoengine.checkpoint import Checkpointer, CheckpointError, resumable
from dinoengine.checkpoint.adopt import fit_config, hints_of_config, require_same_backbone, say_assumed_heads
from dinoengine.checkpoint.files import read_content
from dinoengine.checkpoint.layouts import read_weights
from dinoengine.checkpoint.pixels import require_same_pixels
from dinoengine.checkpoint.weights import Weights
from dinoengine.config import CfgNode, ConfigError, key_origins, read_cfg, validate
from dinoengine.config.config import flatten
from dinoengine.data import DataError
from dinoengine.engine.hooks import parse_duration
from dinoengine.engine.launch import DEFAULT_TIMEOUT, under_torchrun
from dinoengine.engine.precision import resolve_precision
from dinoengine.engine.resuming import CONFIG_FILE, checkpoint_to_fork, saved_config, traces_of_a_run
from dinoengine.evaluation import check_evaluator_names
from dinoengine.modeling import VisionTransformer
from dinoengine.solver import scale_config_to_world_size
from dinoengine.utils import comm
from dinoengine.utils.env import collect_env_info, seed_all_rng
from dinoengine.utils.file_io import atomic_write
from dinoengine.utils.logger import setup_logger
from dinoengine.utils.printable import printable_lines
from dinoengine.utils.startup import process_age

logger = logging.getLogger(__name__)

_SECONDS_FOR_RANK_0 = 3
# Flags by the names that forks of the published DINOv2 training give them.
_FLAGS_FOR_KEYS = {"save-frequency": "SOLVER.CHECKPOINT_PERIOD", "max-to-keep": "SOLVER.CHECKPOINT_MAX_TO_KEEP"}

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE and may stand before or after flags. Examples:

  one process, on a GPU if there is one:
    %(prog)s --config-file configs/quickstart/digits.yaml OUTPUT_DIR output/digits
  8 GPUs, continuing the run in OUTPUT_DIR:
    %(prog)s --config-file cfg.yaml --num-gpus 8 --resume OUTPUT_DIR output/run
  2 processes on the CPU:
    %(prog)s --config-file cfg.yaml --num-gpus 2 MODEL.DEVICE cpu
  evaluate weights:
    %(prog)s --config-file cfg.yaml --eval-only MODEL.WEIGHTS output/run/model_final.pth
  the same run with another setting from its last checkpoint on, in a folder of its own:
    %(prog)s --config-file cfg.yaml --fork-from output/run OUTPUT_DIR output/fork MODEL.LOSS.KOLEO_WEIGHT 0.05
  in a queue that gives 12 hours at a time; the next job goes on where this one paused:
    %(prog)s --config-file cfg.yaml --num-gpus 8 --resume --time-budget 11h50m OUTPUT_DIR output/run
  under torchrun (it decides the number of processes):
    torchrun --nproc-per-node 8 %(prog)s --config-file cfg.yaml
"""


class _IntermixedParser(argparse.ArgumentParser):
    """Takes flags anywhere among the overrides."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def default_argument_parser() -> argparse.ArgumentParser:
    """The flags of every training command, and config overrides as the rest."""
    parser = _IntermixedParser(epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config; without it the defaults")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--fork-from",
        default="",
        metavar="RUN",
        help="start a new run in OUTPUT_DIR from the full state of another, its OUTPUT_DIR or one of its checkpoints; any "
        "key may change. With --resume: unless OUTPUT_DIR has a checkpoint, which is then continued",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (or --resume's checkpoint)")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=None,
        metavar="N",
        help="processes on this machine: one per GPU; 0 = one process on the CPU; with MODEL.DEVICE cpu N processes "
        "on the CPU (default: 1 GPU if there is one)",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="start the command once on each")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url", default=None, metavar="URL", help="tcp://host:port, for several machines; else a free port"
    )
    parser.add_argument(
        "--time-budget",
        type=_duration,
        default=0.0,
        metavar="TIME",
        help="save and end (exit code 75) before this time is over, e.g. 11h50m; counted from the start of the command",
    )
    parser.add_argument(
        "--dist-timeout",
        type=_duration,
        default=DEFAULT_TIMEOUT.total_seconds(),
        metavar="TIME",
        help="how long processes wait for one that is stuck before the run fails (default: 30m)",
    )
    parser.set_defaults(started=time.monotonic(), seconds_before=process_age())
    for flag, key in _FLAGS_FOR_KEYS.items():
        parser.add_argument(f"--{flag}", type=int, default=None, metavar="N", help=f"the same as {key} N")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load_config(args: argparse.Namespace) -> CfgNode:
    """Merge config file and overrides, decide device and number of processes, check everything, freeze.

    Sets ``args.num_gpus`` to the number of processes on this machine.

    Raises:
        ConfigError: names every problem.
    """
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
    for flag, key in _FLAGS_FOR_KEYS.items():
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
    torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    if not args.eval_only:
        cfg = resolve_precision(cfg, earlier)
    logger.info("Rank %d of %d process(es) on %s.", rank, comm.get_world_size(), cfg.MODEL.DEVICE)
    logger.debug("Environment:\n%s", collect_env_info())
    logger.debug("Command line: %s", args)
    logger.debug("Full config:\n%s", cfg.dump())
    if not (args.resume or args.eval_only):
        save_config(cfg)
    seed_all_rng(cfg.SEED)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only and not cfg.DETERMINISTIC
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return cfg


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


@contextlib.contextmanager
def exit_on_user_error(*errors: type[Exception]) -> Iterator[None]:
    """An error of the user's becomes one message and exit code 2; the traceback goes to log.txt.

    Wrong names, missing files, weights that do not fit: the message says what to do, and a traceback would bury it.

    Args:
        errors: types that are the user's; none: those of setting up a run (ValueError, KeyError, OSError, DataError).
    """
    expected = errors or (ValueError, KeyError, OSError, DataError)
    try:
        yield
    except BrokenPipeError:  # an OSError that no user made: see utils.console
        raise
    except expected as error:
        logging.getLogger("dinoengine").debug("Stopped by an error", exc_info=True)
        rank, message = process_rank(), printable_lines(str(error))
        if rank == 0:
            print(f"error: {message}", file=sys.stderr)
        else:
            # Rank 0 mostly fails with the same message, and its end ends this process. What is left after a moment is
            # an error of this rank alone.
            time.sleep(_SECONDS_FOR_RANK_0)
            print(f"error on rank {rank} ({socket.gethostname()}): {message}", file=sys.stderr)
        raise SystemExit(2) from None


def process_rank() -> int:
    """Rank of this process, also before the process group exists."""
    return comm.get_rank() if comm.is_distributed() or not under_torchrun() else int(os.environ["RANK"])


def load_weights_for_evaluation(cfg: CfgNode, model: torch.nn.Module, *, resume: bool) -> str:
    """Load what --eval-only evaluates, the last checkpoint with --resume, else MODEL.WEIGHTS; returns its path.

    Raises:
        ConfigError: if there is neither, or the weights were trained with other pixels.
        CheckpointError, FileNotFoundError: if the weights cannot be loaded.
    """
    checkpointer = Checkpointer(
        model, cfg.OUTPUT_DIR, strict=cfg.MODEL.WEIGHTS_STRICT, before_weights=require_same_pixels(cfg)
    )
    if not cfg.MODEL.WEIGHTS and not (resume and comm.on_main_process(checkpointer.has_checkpoint)):
        raise ConfigError(
            "MODEL.WEIGHTS",
            ["is empty, so there is nothing to evaluate: name a checkpoint, or --resume with the OUTPUT_DIR of a run."],
        )
    path = (comm.on_main_process(checkpointer.get_checkpoint_file) if resume else "") or cfg.MODEL.WEIGHTS
    logger.info("Evaluating the weights of %s.", path)
    checkpointer.load_weights(path)
    return path
