"""The variables by which torchrun tells a process its place; before there is a process group."""

from __future__ import annotations

import os

from dinoengine.utils import comm

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def under_torchrun() -> bool:
    """Whether torchrun (or something that speaks its environment) started this process."""
    return all(name in os.environ for name in _NAMES)


def process_rank() -> int:
    """Rank of this process, also before the process group exists."""
    rank = os.environ.get("RANK", "")
    return int(rank) if under_torchrun() and not comm.is_distributed() and rank.isdecimal() else comm.get_rank()


def require_whole_environment() -> None:
    """
    Raises:
        ValueError: if some variables say that this process is one of several and others are missing, so that each would
            train alone; or if one is no number.
    """
    for name in _NAMES[:3]:
        if under_torchrun() and not os.environ[name].isdecimal():
            raise ValueError(f"The environment variable {name} must be a whole number, got {os.environ[name]!r}.")
    is_one_of_several = "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    if is_one_of_several and not under_torchrun():
        given = ", ".join(f"{name}={os.environ[name]}" for name in _NAMES if name in os.environ)
        missing = ", ".join(name for name in _NAMES if name not in os.environ)
        raise ValueError(
            f"The environment has {given}, as torchrun sets it, but not {missing}: each process would run alone. Set "
            f"all of {', '.join(_NAMES)} (and MASTER_PORT), start with torchrun, or unset them."
        )
