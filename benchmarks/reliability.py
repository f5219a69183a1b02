#!/usr/bin/env python
"""Kill runs and resume them, damage files and read them, and write for as long as a day does; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from damage import damaged_checkpoints, damaged_images
from torch import Tensor, nn

from dinoengine.checkpoint import Checkpointer
from dinoengine.checkpoint.resuming import POINTER, checkpoint_name, endings_of, final_checkpoint
from dinoengine.checkpoint.sharded import is_checkpoint
from dinoengine.engine import SimpleTrainer, default_writers, hooks, run_command
from dinoengine.engine.launch import free_port
from dinoengine.engine.verify import compare_checkpoints
from dinoengine.utils.console import run_tool
from dinoengine.utils.stop_signals import EXIT_PAUSED, end_when_asked

_DESCRIPTION = """
Four parts: runs that are ended by a signal at a random moment and resumed, damaged checkpoints, damaged images, and a day's
volume of iterations, saves and rows. What comes of each kill is printed as it comes, and the figures of a part at its end,
so a benchmark that is cut short loses nothing but the part it is in. Exit code 0 if nothing was lost, else 1; then the
folder with what went wrong stays.
"""

_EPILOG = """
The short version that the test suite runs, and the long one of benchmarks/RESULTS.md, at one go and in parts:

  %(prog)s --kills 1 --mutations 60 --iterations 3600
  %(prog)s --kills 50 --mutations 500 --iterations 86400
  %(prog)s --only kills --kills 50 --signals KILL --world-sizes 1
  %(prog)s --only kills --kills 50 --signals KILL TERM --world-sizes 2
  %(prog)s --only kills --kills 12 --signals KILL --world-sizes 2 --parallel fsdp
  %(prog)s --only checkpoints images volume

How long, on two cores shared with other work (load 8 to 12; less on free ones): a kill with its resume 20 to 25 s, so 50 of
each signal with 1 and 2 processes 70 to 80 minutes, of SIGKILL alone half of that; 500 checkpoints 30 s, 500 images 2 s;
86400 iterations 8 to 35 minutes (3600 took 20 to 82 s).
Parts do not share random numbers: one that is run alone does what it does among the others.
"""

PARTS = ("kills", "checkpoints", "images", "volume")

_ITERATIONS = 30
# A run that spends about half of its time writing checkpoints.
_RUN = (
    *("--config-file", "configs/debug.yaml", "SOLVER.MAX_ITER", str(_ITERATIONS), "SOLVER.CHECKPOINT_PERIOD", "1"),
    *("TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()", "LOG.PERIOD", "1", "LOG.PROGRESS_BAR", "False"),
    *("LOG.TENSORBOARD", "False", "DETERMINISTIC", "True", "MODEL.DEVICE", "cpu"),
)
_SECONDS_TO_END = 120


# Killing ---------------------------------------------------------------------------------------------------------------


def train(words: Sequence[str], rank: int, world_size: int, port: int, log: str) -> None:
    """One process of a run, as torchrun would start it. Forked from a process that has torch imported already."""
    end_when_asked()
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a run from a shell; here it would be that of this process
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_command(argv=words)


@functools.cache
def _fork_server() -> Any:
    """A process that has imported what every process of a run would import again, slowly."""
    context = multiprocessing.get_context("forkserver")
    imports = ["dinoengine.engine.verify", "torchvision.transforms.functional", "PIL.Image", __name__]
    context.set_forkserver_preload(imports)
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


class Run:
    """The processes of one training."""

    def __init__(self, output_dir: str, world_size: int, *words: str) -> None:
        context, port = _fork_server(), free_port()
        command = (*_RUN, "OUTPUT_DIR", output_dir, *words)
        self.output_dir = output_dir
        self.log = output_dir + ".log"
        self.processes = [
            context.Process(target=train, args=(command, rank, world_size, port, self.log))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def end(self) -> list[int | None]:
        """Wait; the exit code of each process, None for one that had to be killed, as it would not end."""
        deadline = time.monotonic() + _SECONDS_TO_END
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return codes

    def wait_for_checkpoints(self, num: int) -> int:
        """Until that many are on disk, or the run ends; returns ``num``, or 0 if it is negative."""
        paths = endings_of(os.path.join(self.output_dir, checkpoint_name(max(0, num - 1))))
        while num > 0 and not any(map(is_checkpoint, paths)) and any(p.is_alive() for p in self.processes):
            time.sleep(0.01)
        return max(0, num)

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def last_lines(self) -> str:
        with open(self.log, encoding="utf-8") as file:
            return file.read()[-3000:]


def train_whole(folder: str, world_size: int, *words: str) -> str:
    """The OUTPUT_DIR of a run that is left alone."""
    out = os.path.join(folder, f"whole{world_size}")
    run = Run(out, world_size, *words)
    codes = run.end()
    if codes != [0] * world_size:
        raise RuntimeError(f"A run that was left alone ended with {codes}:\n{run.last_lines()}")
    return out


def _is_writing(output_dir: str) -> bool:
    """Whether a file or a folder of shares was left unfinished."""
    shards = glob.glob(os.path.join(output_dir, "*.dcp", "shards_*"))
    whole = [path for path in glob.glob(os.path.join(output_dir, "*.dcp")) if is_checkpoint(path)]
    return bool(glob.glob(os.path.join(output_dir, ".*.tmp"))) or len(shards) > len(whole)


def kills(
    folder: str, count: int, world_size: int, number: signal.Signals, rng: random.Random, parallel: str
) -> dict[str, int]:
    """``count`` runs ended by a signal at random moments and resumed to the end; how many became the one left alone.

    SIGKILL ends each process where it stands; after any other signal each must end by itself with EXIT_PAUSED (or 0, if it
    had nothing left to do).
    """
    how_split = ("MODEL.PARALLEL", parallel)
    whole = train_whole(folder, world_size, *how_split)
    ends_well = (-number, 0) if number == signal.SIGKILL else (EXIT_PAUSED, 0)
    found: Counter[str] = Counter(kills=0, equal=0, while_writing=0, before_first_checkpoint=0, after_the_end=0)
    for i in range(count):
        out = os.path.join(folder, f"{number.name}_{i}")
        # Shares are never written in the background.
        words = (*how_split, "SOLVER.CHECKPOINT_IN_BACKGROUND", str(parallel == "ddp" and i % 2 == 1))
        run = Run(out, world_size, *words)
        # Moments are spread over checkpoints and not over seconds, most of which may go into the start.
        num_saved = run.wait_for_checkpoints(rng.randrange(-3, _ITERATIONS))
        time.sleep(rng.uniform(0.0, 0.3 if num_saved else 3.0))
        run.send(number)
        codes = run.end()
        found["kills"] += 1
        found["while_writing"] += _is_writing(out)
        found["before_first_checkpoint"] += not os.path.exists(os.path.join(out, POINTER))
        found["after_the_end"] += bool(final_checkpoint(out))
        outcome = "equal" if all(code in ends_well for code in codes) else f"ended with {codes}"
        if outcome == "equal":
            outcome = _resumed(Run(out, world_size, "--resume", *words), whole, out)
        found["equal"] += outcome == "equal"
        how = f"{world_size} process(es), {number.name} after {num_saved} of {_ITERATIONS} checkpoints"
        print(f"  {i + 1}/{count}  {how}: {outcome}", flush=True)
        if outcome == "equal":
            shutil.rmtree(out)
    return dict(found)


def _resumed(run: Run, whole: str, out: str) -> str:
    """What came of a run that was resumed, in words; "equal" if it is the one that was left alone."""
    codes = run.end()
    if any(code != 0 for code in codes):
        return f"the resumed run ended with {codes}, see {run.log}:\n{run.last_lines()}"
    different = compare_checkpoints(final_checkpoint(whole), final_checkpoint(out)).different
    return f"NOT EQUAL in {different[:5]}, see {out}" if different else "equal"


# Volume ----------------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """The smallest thing that can be trained: what is measured is what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        error = self.linear(x) - x.mean(1, keepdim=True)
        return {"loss_square": error.square().mean(), "loss_abs": error.abs().mean()}


class RandomBatches:
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(4, 8)


def volume(folder: str, iterations: int) -> dict[str, Any]:
    """Memory and open files while that many iterations are run, logged and saved."""
    model = Regression()
    trainer = SimpleTrainer(model, RandomBatches(), torch.optim.AdamW(model.parameters()), gather_metric_period=20)
    checkpointer = Checkpointer(model, folder, trainer=trainer)
    rows: list[dict[str, float]] = []

    def note(running: Any) -> None:
        if (running.iter + 1) % max(1, iterations // 20) == 0:
            open_files = len(os.listdir("/proc/self/fd"))
            rows.append({"iteration": running.iter + 1, "rss_mib": _rss_mib(), "open_files": open_files})

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.PeriodicCheckpointer(checkpointer, max(1, iterations // 144), 3),
            hooks.CallbackHook(after_step=note),
            hooks.PeriodicWriter(lambda: default_writers(folder, iterations, progress_bar=False)[1:], 20),
        ]
    )
    trainer.train(0, iterations)
    written = sum(os.path.getsize(path) for path in glob.glob(os.path.join(folder, "*")))
    return {"rows": rows, "saves": iterations // max(1, iterations // 144), "mib_on_disk": written / 2**20}


def _rss_mib() -> float:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure_volume(folder: str, iterations: int) -> bool:
    """Whether memory and open files stayed as they were; prints them."""
    found = volume(folder, iterations)
    first, last = found["rows"][len(found["rows"]) // 4], found["rows"][-1]
    print(f"volume: {iterations} iterations, {found['saves']} saves, {found['mib_on_disk']:.0f} MiB on disk")
    print(f"  memory and open files at a quarter: {json.dumps(first)}\n  at the end: {json.dumps(last)}")
    return bool(last["open_files"] <= first["open_files"] and last["rss_mib"] < 1.1 * first["rss_mib"])


# The command -----------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = functools.partial(parser.add_argument, type=int, metavar="N")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    add("--kills", default=50, help="for each number of processes and signal (default: 50)")
    add("--world-sizes", nargs="+", default=[1, 2], help="numbers of processes of a run (default: 1 2)")
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="MODEL.PARALLEL of the runs; with fsdp several processes write checkpoints of shares (default: ddp)",
    )
    signals = ("KILL", "TERM", "INT", "USR1")
    parser.add_argument("--signals", nargs="+", choices=signals, default=signals[:2], help="(default: KILL TERM)")
    add("--mutations", default=500, help="checkpoints, and images (default: 500)")
    add("--iterations", default=86400, help="of the run for volume: a day of one a second (default)")
    add("--seed", default=0, help="of kill times and damage (default: 0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.getLogger("dinoengine").setLevel(logging.ERROR)  # hundreds of damaged files are warned of
    top = tempfile.mkdtemp(prefix="reliability_")
    good = True
    for part, measure in _parts(args):
        begin = time.monotonic()
        folder = os.path.join(top, part.replace(" ", "_"))
        os.makedirs(folder)
        is_good = measure(folder, random.Random(f"{args.seed} {part}"))
        print(f"  {part}: {time.monotonic() - begin:.0f} s", flush=True)
        if is_good:
            shutil.rmtree(folder)
        good &= is_good
    print("verdict: " + ("nothing was lost" if good else f"SOMETHING IS WRONG, see above and {top}"))
    if good:
        shutil.rmtree(top)
    return int(not good)


def _parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[str, random.Random], bool]]]:
    """Name -> what is measured in a folder; whether it is good."""

    def kill(world_size: int, number: signal.Signals) -> Callable[[str, random.Random], bool]:
        def measure(folder: str, rng: random.Random) -> bool:
            found = kills(folder, args.kills, world_size, number, rng, args.parallel)
            equal = f"{found['equal']} of {found['kills']} bitwise equal"
            run = f"{world_size} process(es)" + (", fsdp" if args.parallel == "fsdp" else "")
            print(f"ended by {number.name} and resumed, {run}: {equal} {found}")
            return found["equal"] == found["kills"]

        return measure

    def damage(name: str, read: Callable[[str, int, random.Random], dict[str, int]]) -> Callable[..., bool]:
        def measure(folder: str, rng: random.Random) -> bool:
            found = read(folder, args.mutations, rng)
            print(f"damaged {name}: {found['wrong']} of {found['files']} wrong {found}")
            return not found["wrong"]

        return measure

    if "kills" in args.only:
        for world_size in args.world_sizes:
            for name in args.signals:
                yield f"kills {world_size} {name}", kill(world_size, signal.Signals[f"SIG{name}"])
    if "checkpoints" in args.only:
        yield "checkpoints", damage("checkpoints", damaged_checkpoints)
    if "images" in args.only:
        yield "images", damage("images", damaged_images)
    if "volume" in args.only:
        yield "volume", lambda folder, rng: measure_volume(folder, args.iterations)


if __name__ == "__main__":
    run_tool(main)
