#!/usr/bin/env python
"""Kill a training, resume it, and compare it with one that was never interrupted; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

# Threads that wait must sleep, not spin: see tools/train_net.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dinoengine.checkpoint.resuming import final_checkpoint
from dinoengine.config import read_cfg
from dinoengine.config.arguments import config_parser
from dinoengine.engine import exit_on_user_error
from dinoengine.engine.verify import compare_checkpoints, recorded_samples
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Train 2N iterations twice: at one go, and saved after N iterations, killed (SIGKILL) some iterations later and resumed.
Compare what each iteration was fed (hashes of every crop, mask and label, in the global order) and what came of it
(weights, teacher, heads, centres, optimizer, hooks, metric history; not times). Prints a verdict; exit code 0 if the runs
are the same, else 1.

With the same number of processes the states must be bitwise equal. With another number sums are taken in another order and
stochastic depth draws from other generators: then the samples must be the same, and the verdict is about them alone.
"""

_EPILOG = """
Overrides are PATH.KEY VALUE or PATH.KEY=VALUE. Examples:

  one process on the CPU:
    %(prog)s --config-file configs/debug.yaml --num-gpus 0
  killed with 2 processes, resumed with 1 process and other workers:
    %(prog)s --config-file configs/debug.yaml --num-gpus 2 --resume-num-gpus 1 --resume-workers 3 MODEL.DEVICE cpu
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = config_parser(_DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--iterations",
        type=int,
        default=10,
        metavar="N",
        help="before the checkpoint (default: 10); it sets SOLVER.MAX_ITER, to 2N",
    )
    parser.add_argument("--num-gpus", type=int, metavar="W", help="processes, as in train_net.py (default: one)")
    parser.add_argument("--resume-num-gpus", type=int, metavar="W", help="those of the resumed run (default: the same)")
    parser.add_argument("--resume-workers", type=int, metavar="N", help="its DATALOADER.NUM_WORKERS (default: same)")
    parser.add_argument("--keep", metavar="DIR", help="leave the runs in this folder, which must not exist")
    args = parser.parse_args(argv)
    if args.iterations < 2:
        parser.error("--iterations must be at least 2.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        read_cfg(args.config_file, args.opts)
        folder = args.keep or tempfile.mkdtemp(prefix="verify_resume_")
        if args.keep:
            os.makedirs(folder)
    try:
        return verify(args, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def verify(args: argparse.Namespace, folder: str) -> int:
    """Train, kill, resume, compare; returns the exit code."""
    num = args.iterations
    kill_at = num + (num + 1) // 2
    whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
    resume_num_gpus = args.num_gpus if args.resume_num_gpus is None else args.resume_num_gpus
    workers = {} if args.resume_workers is None else {"DATALOADER.NUM_WORKERS": args.resume_workers}

    print(f"1/3 {2 * num} iterations at one go ...", flush=True)
    _train(args, whole, args.num_gpus)
    print(f"2/3 saved after {num} iterations, killed after {kill_at} ...", flush=True)
    _train(args, killed, args.num_gpus, ("--kill-at", kill_at), is_killed=True)
    print(f"3/3 resumed, to {2 * num} iterations ...", flush=True)
    _train(args, killed, resume_num_gpus, ("--resume",), workers)

    has_same_samples = _compare_samples(whole, killed, num)
    state = compare_checkpoints(final_checkpoint(whole), final_checkpoint(killed))
    is_same = has_same_samples
    if not state.different:
        print(f"state     bitwise equal: {state.num_entries} entries of model, optimizer, hooks and history")
    elif resume_num_gpus != args.num_gpus:
        print("state     not compared: the resumed run had another number of processes")
    else:
        some = ", ".join(state.different[:3])
        how_many = f"{len(state.different)} of {state.num_entries} entries"
        print(f"state     DIFFERENT in {how_many}, by {state.largest:.1e} at most: {some} ...")
        is_same = False
    exact = "EXACT" if not state.different else "THE SAME SAMPLES"
    print(f"verdict   {exact if is_same else 'NOT THE SAME RUN'}")
    return int(not is_same)


def _compare_samples(whole: str, killed: str, num: int) -> bool:
    try:
        ours, theirs = recorded_samples(whole), recorded_samples(killed)
    except ValueError as error:
        print(f"samples   DIFFERENT: {error}")
        return False
    num_samples = sum(len(samples) for samples in ours.values())
    wrong = [i for i in range(2 * num) if i not in ours or ours[i] != theirs.get(i)]
    if not wrong:
        print(f"samples   the same: {num_samples} in {len(ours)} iterations, in the same order")
        return True
    print(
        f"samples   DIFFERENT in {len(wrong)} of {2 * num} iterations: {', '.join(map(str, wrong[:10]))} "
        f"(counted from 0; the resumed run began with {num})"
    )
    return False


def _train(
    args: argparse.Namespace,
    output_dir: str,
    num_gpus: int | None,
    flags: Sequence[object] = (),
    changes: dict[str, object] | None = None,
    *,
    is_killed: bool = False,
) -> None:
    settings: dict[str, object] = {
        "OUTPUT_DIR": output_dir,
        "SOLVER.MAX_ITER": 2 * args.iterations,
        "SOLVER.CHECKPOINT_PERIOD": args.iterations,
        "LOG.PERIOD": 1,
        "LOG.PROGRESS_BAR": False,
        "DETERMINISTIC": True,
        "SEED": max(0, read_cfg(args.config_file, args.opts).SEED),
        **(changes or {}),
    }
    words: list[object] = [sys.executable, "-m", "dinoengine.engine.verify", *flags]
    words += ["--num-gpus", num_gpus] if num_gpus is not None else []
    words += ["--config-file", args.config_file] if args.config_file else []
    words += [*args.opts, *(word for setting in settings.items() for word in setting)]
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    was_killed = done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    if done.returncode and not (is_killed and was_killed):
        print(done.stdout)
        raise SystemExit(f"error: a training failed with exit code {done.returncode}; its output is above.")
    assert was_killed == is_killed, "the run that was to be killed ended by itself"


if __name__ == "__main__":
    run_tool(main)
