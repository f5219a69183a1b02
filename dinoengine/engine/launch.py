"""Start the processes of a run, or join those that torchrun started."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinoengine.engine.torchrun import require_whole_environment, under_torchrun
from dinoengine.engine.user_errors import exit_on_user_error
from dinoengine.utils import comm
from dinoengine.utils.stop_signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

_SECONDS_TO_FAIL = 10
DEFAULT_TIMEOUT = timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_processes_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple[Any, ...] = (),
    *,
    device: str = "cuda",
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> Any:
    """Run ``main_func(*args)`` in every process of the run.

    Under torchrun this process is one of them. Otherwise one process runs it here, and several are spawned (so
    ``main_func`` and ``args`` must be picklable).

    Args:
        num_processes_per_machine: one per GPU, or any number on the CPU.
        dist_url: e.g. "tcp://host:port", the same on every machine; None picks a free port on a single machine.
        device: "cuda" (nccl, one GPU per process) or "cpu" (gloo).
        timeout: of collectives: how long the others wait for a process that is stuck.

    Returns:
        What ``main_func`` returned, when it ran in this process; None when processes were spawned.

    Raises:
        ValueError: if several machines have no ``dist_url``, or the environment has a part of what torchrun sets.
        SystemExit: with the exit code of a spawned process that ended with one; 2 if the processes do not find each other.
    """
    require_whole_environment()
    if under_torchrun():
        return _run_in_group("env://", None, None, device, timeout, main_func, args)
    world_size = num_machines * num_processes_per_machine
    if world_size <= 1:
        return main_func(*args)
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("Several machines need --dist-url tcp://<address of the first machine>:<free port>.")
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    start_method = multiprocessing.get_start_method()
    of_all = (num_processes_per_machine, world_size, machine_rank, dist_url, device, timeout, start_method)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # says that it ends the other processes
    try:
        _spawn_and_wait(num_processes_per_machine, (*of_all, main_func, args))
    except mp.ProcessExitedException as error:
        if error.signal_name:
            hint = "; the machine may be out of memory" if error.signal_name == "SIGKILL" else ""
            logger.error("Process %d of this run was ended by %s%s.", error.error_index, error.signal_name, hint)
        # Otherwise the process has said why; exit as it did (a shell's code for one that a signal ended).
        raise SystemExit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code) from None
    return None


def _spawn_and_wait(num_processes: int, rank_args: tuple[Any, ...]) -> None:
    processes: Any = mp.spawn(_spawned, nprocs=num_processes, args=rank_args, join=False)

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in processes.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS} if is_main_thread else {}
    try:
        # When one has failed the others get a moment to fail by themselves and say why, before they are ended.
        while not processes.join(grace_period=_SECONDS_TO_FAIL):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawned(
    local_rank: int,
    local_size: int,
    world_size: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    timeout: timedelta,
    start_method: str,
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # A spawned process would spawn its own, too: each worker of a loader would import torch anew, for every evaluation.
    multiprocessing.set_start_method(start_method, force=True)
    if hasattr(os, "setsid"):
        os.setsid()  # a Ctrl-C of the terminal goes to the launching process alone, which passes it on: once, not twice
    rank = machine_rank * local_size + local_rank
    os.environ.update(LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_size))
    if device == "cpu":  # the processes share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    _run_in_group(dist_url, rank, world_size, device, timeout, main_func, args)


def _run_in_group(
    url: str,
    rank: int | None,
    world_size: int | None,
    device: str,
    timeout: timedelta,
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    options: dict[str, Any] = {} if rank is None else {"rank": rank, "world_size": world_size}
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before the group, or every process claims GPU 0
    with exit_on_user_error():
        _join_group(url, device, timeout, options)
    try:
        return main_func(*args)
    finally:
        comm.destroy_process_group()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join_group(url: str, device: str, timeout: timedelta, options: dict[str, Any]) -> None:
    """
    Raises:
        ConnectionError: if the processes do not find each other within ``timeout``.
    """
    try:
        comm.init_process_group("nccl" if device == "cuda" else "gloo", timeout, init_method=url, **options)
        comm.synchronize()
    except dist.DistError as error:
        env = os.environ
        rank, world_size = (options or {"rank": env.get("RANK"), "world_size": env.get("WORLD_SIZE")}).values()
        where = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}" if url == "env://" else url
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConnectionError(
            f"Process {rank} of {world_size} did not find the others at {where} within {timeout.total_seconds():.0f} s "
            f"({reason}). Is each machine started, with the same address, a rank of its own and the same number of "
            "processes, and is the port open? --dist-timeout waits longer."
        ) from error
