#!/usr/bin/env python
"""Kill runs and resume them, damage files and read them, and write for as long as a day does; ``--help`` shows examples."""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinoengine.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from dinoengine.checkpoint.digest import content_digest
from dinoengine.data import UnreadableImageError
from dinoengine.data.decode import read_image
from dinoengine.engine import SimpleTrainer, default_writers, hooks, run_command
from dinoengine.engine.verify import compare_checkpoints
from dinoengine.utils.console import run_tool

_EPILOG = """
The short version that the test suite runs, and the long one of benchmarks/RESULTS.md:

  %(prog)s --kills 4 --mutations 60 --iterations 3000
  %(prog)s --kills 50 --mutations 500 --iterations 86400
"""

# A run that spends about half of its time writing checkpoints.
_RUN = (
    *("--config-file", "configs/debug.yaml", "SOLVER.MAX_ITER", "30", "SOLVER.CHECKPOINT_PERIOD", "1"),
    *("TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()", "LOG.PERIOD", "1", "LOG.PROGRESS_BAR", "False"),
    *("LOG.TENSORBOARD", "False", "DETERMINISTIC", "True", "MODEL.DEVICE", "cpu"),
)
_SECONDS_TO_END = 120
_SECONDS_TO_READ = 60


# Killing ---------------------------------------------------------------------------------------------------------------


def train(words: Sequence[str], rank: int, world_size: int, port: int, log: str) -> None:
    """One process of a run, as torchrun would start it. Forked from a process that has torch imported already."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_command(argv=words)


class Run:
    """The processes of one training."""

    def __init__(self, output_dir: str, world_size: int, *words: str) -> None:
        context = multiprocessing.get_context("forkserver")
        # What every worker would import again, slowly.
        imports = ["dinoengine.engine.verify", "torchvision.transforms.functional", "PIL.Image", __name__]
        context.set_forkserver_preload(imports)
        port = _free_port()
        command = (*_RUN, "OUTPUT_DIR", output_dir, *words)
        self.log = output_dir + ".log"
        self.processes = [
            context.Process(target=train, args=(command, rank, world_size, port, self.log))
            for rank in range(world_size)
        ]
        self.begin = time.monotonic()
        for process in self.processes:
            process.start()

    def end(self) -> None:
        """Wait; every process must end by itself, and well."""
        for process in self.processes:
            process.join(_SECONDS_TO_END)
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            with open(self.log, encoding="utf-8") as file:
                raise RuntimeError(f"A run ended with {codes}:\n{file.read()[-3000:]}")

    def kill(self) -> None:
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def kills(folder: str, count: int, world_size: int, rng: random.Random) -> dict[str, int]:
    """``count`` runs killed at random moments and resumed to the end; how many became the run that was never killed."""
    whole = os.path.join(folder, f"whole{world_size}")
    Run(whole, world_size).end()  # once for the fork server to start
    shutil.rmtree(whole)
    reference = Run(whole, world_size)
    reference.end()
    seconds = time.monotonic() - reference.begin
    found: Counter[str] = Counter(kills=0, equal=0, while_writing=0, before_first_checkpoint=0, after_the_end=0)
    for number in range(count):
        out = os.path.join(folder, f"killed{world_size}_{number}")
        background = ("SOLVER.CHECKPOINT_IN_BACKGROUND", str(number % 2 == 1))
        run = Run(out, world_size, *background)
        time.sleep(rng.uniform(0.1, 1.0) * seconds)
        run.kill()
        found["kills"] += 1
        found["while_writing"] += bool(glob.glob(os.path.join(out, ".*.tmp")))
        found["before_first_checkpoint"] += not os.path.exists(os.path.join(out, "last_checkpoint"))
        found["after_the_end"] += os.path.exists(os.path.join(out, "model_final.pth"))
        Run(out, world_size, "--resume", *background).end()
        difference = compare_checkpoints(*(os.path.join(run, "model_final.pth") for run in (whole, out)))
        found["equal"] += not difference.different
        if difference.different:
            print(f"kill {number}: {difference.different[:5]} differ; see {out}")
        else:
            shutil.rmtree(out)
        _progress(f"kills, {world_size} process(es)", number + 1, count)
    return dict(found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Damage ----------------------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged bytes); never the same bytes."""
    kind = rng.choice(("bit", "byte", "truncated", "empty", "zeros", "swapped", "shifted", "appended", "head"))
    at, size = rng.randrange(len(data)), min(512, len(data) // 4)
    damaged = bytearray(data)
    if kind == "bit":
        damaged[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        damaged[at] = (damaged[at] + rng.randrange(1, 256)) % 256
    elif kind == "truncated":
        del damaged[at:]
    elif kind == "empty":
        damaged.clear()
    elif kind == "zeros":
        damaged[at : at + size] = bytes(len(damaged[at : at + size]))
    elif kind == "swapped":
        a, b = rng.randrange(len(data) // 2 - size), rng.randrange(len(data) // 2, len(data) - size)
        damaged[a : a + size], damaged[b : b + size] = damaged[b : b + size], damaged[a : a + size]
    elif kind == "shifted":
        del damaged[at : at + rng.randrange(1, 9)]
    elif kind == "appended":
        damaged += rng.randbytes(size)
    else:
        damaged[:16] = rng.randbytes(16)
    return (kind, bytes(damaged)) if bytes(damaged) != data else mutate(data, rng)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def give_up(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged_checkpoints(folder: str, count: int, rng: random.Random) -> dict[str, int]:
    """Damaged checkpoint files: refused with the file's name, or read as what was written; anything else is wrong."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    source = Checkpointer(model, folder).save("good", iteration=7)
    with open(source, "rb") as file:
        data = file.read()
    content = content_digest(read_checkpoint(source))
    path = os.path.join(folder, "damaged.pth")
    found: Counter[str] = Counter(files=0, refused=0, same_content=0, wrong=0)
    for number in range(count):
        kind, damaged = mutate(data, rng)
        with open(path, "wb") as file:
            file.write(damaged)
        outcome = "wrong"
        try:
            with _at_most(_SECONDS_TO_READ):
                outcome = "same_content" if content_digest(read_checkpoint(path)) == content else "wrong"
        except CheckpointError as error:
            outcome = "refused" if path in str(error) else "wrong"
        except Exception as error:
            print(f"checkpoint {number} ({kind}): {type(error).__name__}: {error}")
        if outcome == "wrong":
            shutil.copy(path, os.path.join(folder, f"wrong_{number}_{kind}.pth"))
            print(f"checkpoint {number} ({kind}) was read as something else, or refused without its name")
        found[outcome] += 1
        found["files"] += 1
        _progress("damaged checkpoints", number + 1, count)
    return dict(found)


def damaged_images(folder: str, count: int, rng: random.Random) -> dict[str, int]:
    """Damaged image files: refused with the file's name, or decoded (a flipped bit may be a pixel)."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    originals = {}
    for extension in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, extension)
        originals[extension] = buffer.getvalue()
    found: Counter[str] = Counter(files=0, refused=0, decoded=0, wrong=0)
    for number in range(count):
        extension = rng.choice(sorted(originals))
        kind, damaged = mutate(originals[extension], rng)
        path = os.path.join(folder, f"damaged.{extension.lower()}")
        with open(path, "wb") as file:
            file.write(damaged)
        outcome = "wrong"
        try:
            with _at_most(_SECONDS_TO_READ):
                read_image(path)
            outcome = "decoded"
        except UnreadableImageError as error:
            outcome = "refused" if path in str(error) else "wrong"
        except Exception as error:
            print(f"image {number} ({extension}, {kind}): {type(error).__name__}: {error}")
        if outcome == "wrong":
            shutil.copy(path, os.path.join(folder, f"wrong_{number}_{kind}.{extension.lower()}"))
        found[outcome] += 1
        found["files"] += 1
        _progress("damaged images", number + 1, count)
    return dict(found)


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
            _progress("iterations", running.iter + 1, iterations)

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


def _progress(what: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{of} ", end="\n" if done == of else "", file=sys.stderr, flush=True)


# The command -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="for each number of processes (default: 50)")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], metavar="W", help="(default: 1 2)")
    parser.add_argument(
        "--mutations", type=int, default=500, metavar="N", help="checkpoints, and images (default: 500)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=86400,
        metavar="N",
        help="of the run for volume: a day of one a second (default)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of kill times and damage (default: 0)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    good = True
    with tempfile.TemporaryDirectory(prefix="reliability_") as folder:
        for world_size in args.processes if args.kills else ():
            result = kills(folder, args.kills, world_size, rng)
            equal = f"{result['equal']} of {result['kills']} bitwise equal"
            print(f"killed and resumed, {world_size} process(es): {equal} {result}", flush=True)
            good &= result["equal"] == result["kills"]
        for damage in (damaged_checkpoints, damaged_images) if args.mutations else ():
            result = damage(folder, args.mutations, rng)
            print(
                f"{damage.__name__.replace('_', ' ')}: {result['wrong']} of {result['files']} wrong {result}",
                flush=True,
            )
            good &= not result["wrong"]
        if args.iterations:
            found = volume(os.path.join(folder, "volume"), args.iterations)
            first, last = found["rows"][len(found["rows"]) // 4], found["rows"][-1]
            print(
                f"volume: {args.iterations} iterations, {found['saves']} saves, {found['mib_on_disk']:.0f} MiB on disk"
            )
            print(f"  memory and open files at a quarter: {json.dumps(first)}\n  at the end: {json.dumps(last)}")
            good &= last["open_files"] <= first["open_files"] and last["rss_mib"] < 1.1 * first["rss_mib"]
    print("verdict: " + ("nothing was lost" if good else "SOMETHING IS WRONG, see above"))
    return int(not good)


if __name__ == "__main__":
    run_tool(main)
