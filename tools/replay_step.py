#!/usr/bin/env python
"""Run one step of a run again, to see where a loss or gradient stopped being finite."""

from __future__ import annotations

import argparse
import sys
import tempfile

from dinoengine.config import CfgNode
from dinoengine.engine import exit_on_user_error, launch
from dinoengine.engine.replay import missing_record, read_records, recorded_steps, render, replay, replay_config
from dinoengine.utils import comm
from dinoengine.utils.console import run_tool

_DESCRIPTION = """
Loads the state before a step (bad_steps/model_before_*.pth, else the newest checkpoint before it, from which the steps
between are run again), takes the same images, crops, masks and seeds, and computes loss and gradients once more.
Prints every loss term beside the recorded one, the first module whose output is not finite, the images it belongs to,
the first such gradient, and a verdict. Writes nothing into the run. A step that was finite can be looked at as well.

Exit code: 0; 1 if a recorded bad step is finite here (other kernels, another device or number of processes);
2 for wrong input.
"""
_EPILOG = """
examples:
  the last bad step of a run:             %(prog)s --run output/run
  on two processes, as the run had them:  %(prog)s --run output/run --iteration 4711 --num-gpus 2
  is it the precision?                    %(prog)s --run output/run SOLVER.AMP.ENABLED False
  on the CPU:                             %(prog)s --run output/run MODEL.DEVICE cpu
"""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="OUTPUT_DIR of the run")
    parser.add_argument("--iteration", type=int, metavar="N", help="the step (default: the last one in bad_steps)")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="processes, as for train_net.py (default: one)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(words)
    with exit_on_user_error(), tempfile.TemporaryDirectory() as scratch:
        known = recorded_steps(args.run)
        if args.iteration is None and not known:
            raise ValueError(f"{args.run} has no bad_steps; name a step with --iteration.")
        iteration = known[-1] if args.iteration is None else args.iteration
        cfg, num_processes = replay_config(args.run, args.opts, args.num_gpus, scratch)
        if not 0 <= iteration < cfg.SOLVER.MAX_ITER:
            raise ValueError(f"--iteration must be from 0 to {cfg.SOLVER.MAX_ITER - 1}, got {iteration}.")
        code = launch(_report, num_processes, args=(cfg, args.run, iteration), device=cfg.MODEL.DEVICE)
    return int(code or 0)


def _report(cfg: CfgNode, run_dir: str, iteration: int) -> int:
    """What each process does; the code to exit with."""
    with exit_on_user_error():
        replays = replay(cfg, run_dir, iteration)
    records = read_records(run_dir, iteration)
    if comm.is_main_process():
        if missing := missing_record(run_dir, iteration):
            print(missing)
        print(render(replays, records, cfg.MODEL.VIT.DROP_PATH_RATE))
    code = 1 if records and replays[0].is_finite else 0
    if comm.is_distributed() and code:
        sys.exit(code)
    return code


if __name__ == "__main__":
    run_tool(main)
