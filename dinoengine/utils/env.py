"""Seeding and the environment report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import sys

import numpy as np
import torch
from tabulate import tabulate

_MASK = (1 << 64) - 1


def hash_seed(*values: int) -> int:
    """Mix integers into a 63-bit seed (splitmix64 finaliser); stable over processes, platforms and versions."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state ^= state >> 30
        state = (state * 0xBF58476D1CE4E5B9) & _MASK
        state ^= state >> 27
        state = (state * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_all_rng(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - libraries that use the global generator
    torch.manual_seed(seed)


def seed_step_rng(seed: int, iteration: int, rank: int) -> None:
    """Make the torch draws of one step (stochastic depth) a function of (seed, iteration, rank).

    A resumed run then needs no saved generator state. Costs microseconds.
    """
    torch.manual_seed(step_seed(seed, iteration, rank))


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """What ``seed_step_rng`` seeds torch with."""
    return hash_seed(seed, iteration, rank, 0x57E9)


def collect_env_info() -> str:
    """A table of what a bug report needs: versions, CPUs, memory, GPUs. Imports none of the packages it lists."""
    rows = [
        ("Python", sys.version.split()[0]),
        ("platform", platform.platform()),
        ("CPU cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"),
        ("torch threads", str(torch.get_num_threads())),
    ]
    for package in (
        "dinoengine",
        "torch",
        "torchvision",
        "xformers",
        "numpy",
        "pillow",
        "fvcore",
        "iopath",
        "yacs",
    ):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        rows += [(f"GPU {i}", f"{d.name}, {d.total_memory / 2**30:.0f} GiB") for i, d in enumerate(devices)]
        rows.append(("CUDA", str(torch.version.cuda)))
    else:
        rows.append(("GPU", "none visible"))
    for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE"):
        if variable in os.environ:
            rows.append((variable, os.environ[variable]))
    return tabulate(rows)
