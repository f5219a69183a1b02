"""The flags of every training command, and config overrides as the rest."""

from __future__ import annotations

import argparse
import time

from dinoengine.config.arguments import config_parser
from dinoengine.engine.hooks import parse_duration
from dinoengine.engine.launch import DEFAULT_TIMEOUT
from dinoengine.utils.startup import process_age

# Flags by the names that forks of the published DINOv2 training give them.
FLAGS_FOR_KEYS = {"save-frequency": "SOLVER.CHECKPOINT_PERIOD", "max-to-keep": "SOLVER.CHECKPOINT_MAX_TO_KEEP"}


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


def default_argument_parser() -> argparse.ArgumentParser:
    """The flags of every training command, and config overrides as the rest."""
    parser = config_parser("", _EPILOG)
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
    for flag, key in FLAGS_FOR_KEYS.items():
        parser.add_argument(f"--{flag}", type=int, default=None, metavar="N", help=f"the same as {key} N")
    return parser


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
