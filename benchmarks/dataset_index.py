#!/usr/bin/env python
"""Seconds and MiB to start from the kept index of a large folder, with workers, and of the first scan.

    python benchmarks/dataset_index.py                         # 1,281,167 empty files in a temporary folder
    python benchmarks/dataset_index.py --simulated             # a listing of as many names in place of files

Memory is the proportional set size (PSS) of the process and its workers over what they had before the dataset was made: a
page that several share counts once. Every worker has then read the paths and labels of 20,000 random images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any, TypeVar

from dinoengine.data import ImageDataset, build_dataset, file_index
from dinoengine.data.folder_scan import FolderScan
from dinoengine.utils.env import collect_env_info

NUM_CLASSES = 1000
READS = 20_000

Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167, metavar="N")
    parser.add_argument("--workers", type=int, default=8, metavar="N")
    parser.add_argument(
        "--simulated", action="store_true", help="folders without files, and a listing in place of the scan"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "train")
        os.environ["DINOENGINE_CACHE"] = os.path.join(folder, "cache")
        names = [f"n{i % NUM_CLASSES:08d}/n{i % NUM_CLASSES:08d}_{i // NUM_CLASSES}.JPEG" for i in range(args.images)]
        make_tree(root, [] if args.simulated else names)
        if args.simulated:
            stamps = [(name, 1_000_000_000) for name in (".", *sorted(os.listdir(root)))]
            listing = FolderScan(sorted(names), Counter(), stamps)
            file_index.scan_folder = lambda _: listing
        del names
        seconds = in_new_process(start, root)
        print(f"first start, with a scan{' (simulated)' if args.simulated else ''}: {seconds:.2f} s")
        seconds, before, after = in_new_process(start_with_workers, root, args.workers)
        print(
            f"start from the index: {seconds:.2f} s; {after - before:.0f} MiB for it in 1 + {args.workers} processes "
            f"({args.images:,} images, index of {index_size(folder):.0f} MiB)"
        )
    print(collect_env_info())


def make_tree(root: str, names: list[str]) -> None:
    """Folders of an age at which an index is trusted, with empty files."""
    for number in range(NUM_CLASSES):
        os.makedirs(os.path.join(root, f"n{number:08d}"))
    for name in names:
        os.close(os.open(os.path.join(root, name), os.O_CREAT | os.O_WRONLY))
    for folder in (*(os.path.join(root, f"n{number:08d}") for number in range(NUM_CLASSES)), root):
        os.utime(folder, (1, 1))


def start(root: str) -> float:
    begin = time.perf_counter()
    build_dataset(f"folder:{root}")
    return time.perf_counter() - begin


def start_with_workers(root: str, num_workers: int) -> tuple[float, float, float]:
    """(seconds, MiB of all processes without the dataset, MiB with it)."""
    build_dataset("synthetic:num_images=1")  # what is imported only once
    before = tree_mib(num_workers, None)
    begin = time.perf_counter()
    dataset = build_dataset(f"folder:{root}")
    seconds = time.perf_counter() - begin
    return seconds, before, tree_mib(num_workers, dataset)


def tree_mib(num_workers: int, dataset: ImageDataset | None) -> float:
    """MiB of this process and of forked workers that have read from the dataset."""
    ready, done = multiprocessing.Barrier(num_workers + 1), multiprocessing.Barrier(num_workers + 1)
    workers = [multiprocessing.Process(target=read, args=(dataset, i, ready, done)) for i in range(num_workers)]
    for worker in workers:
        worker.start()
    ready.wait()
    mib = sum(pss_mib(pid) for pid in (os.getpid(), *(worker.pid or 0 for worker in workers)))
    done.wait()
    for worker in workers:
        worker.join()
    return mib


def read(dataset: ImageDataset | None, seed: int, ready: Barrier, done: Barrier) -> None:
    dice = random.Random(seed)
    if dataset is not None:
        for _ in range(READS):
            index = dice.randrange(len(dataset))
            dataset.path(index), dataset.label(index)
    ready.wait()
    done.wait()


def pss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        found = re.search(r"^Pss:\s+(\d+) kB", file.read(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def in_new_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a call in a forked process, which ends and leaves no memory behind."""
    results: multiprocessing.Queue[Result] = multiprocessing.Queue()
    process = multiprocessing.Process(target=lambda: results.put(work(*arguments)))
    process.start()
    result = results.get()
    process.join()
    return result


def index_size(folder: str) -> float:
    cache = os.path.join(folder, "cache", "index")
    return sum(os.path.getsize(os.path.join(cache, name)) for name in os.listdir(cache)) / 2**20


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    main()
