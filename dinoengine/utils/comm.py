"""Distributed primitives that do the right thing at world size 1.

Tensor collectives run on the default group (nccl on CUDA, gloo on CPU). Object collectives pickle through a gloo
group, so they work whatever the device.
"""

from __future__ import annotations

import gc
import os
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# While some processes still work the others hear from them this often; far below any time limit of a collective.
HEARTBEAT_SECONDS = 60.0


# By default group, so that a process which opens a second one (tests do) gets a fresh one.
_object_groups: dict[Any, Any] = {}


def init_process_group(backend: str, timeout: timedelta, **options: Any) -> None:
    """Open the process group; ``destroy_process_group`` ends it.

    Args:
        backend: "nccl" or "gloo".
        timeout: how long any collective waits for the slowest process, of tensors and of objects.
        options: of ``torch.distributed.init_process_group``.
    """
    dist.init_process_group(backend, timeout=timeout, **options)
    _object_group(timeout)


def is_distributed() -> bool:
    """True inside an initialised process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_local_rank() -> int:
    """Rank within this machine; ``launch`` and torchrun both set LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def synchronize() -> None:
    """Barrier over all processes."""
    if not is_distributed():
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def _object_group(timeout: timedelta | None = None) -> Any:
    world = dist.group.WORLD
    if world not in _object_groups:
        # Of its own it would wait for torch's half hour, whatever the first group does.
        is_nccl = dist.get_backend(world) == dist.Backend.NCCL
        _object_groups[world] = dist.new_group(backend="gloo", timeout=timeout) if is_nccl else world
    return _object_groups[world]


def destroy_process_group() -> None:
    """End the process group, with nothing left that holds it.

    What still held it would be destroyed when the interpreter ends, where joining its threads can abort the process.
    """
    _object_groups.clear()
    gc.collect()  # a trainer and its DDP model are a reference cycle
    dist.destroy_process_group()


def all_gather(data: Any) -> list[Any]:
    """Every rank's ``data`` (any picklable object), in rank order, on every rank."""
    if not is_distributed():
        return [data]
    output: list[Any] = [None] * get_world_size()
    dist.all_gather_object(output, data, group=_object_group())
    return output


def gather(data: Any, dst: int = 0) -> list[Any]:
    """Every rank's ``data`` in rank order on rank ``dst``; an empty list elsewhere."""
    if not is_distributed():
        return [data]
    output: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, output, dst=dst, group=_object_group())
    return output or []


def broadcast_object(data: Any, src: int = 0) -> Any:
    """Rank ``src``'s ``data`` on every rank."""
    if not is_distributed():
        return data
    box = [data]
    dist.broadcast_object_list(box, src=src, group=_object_group())
    return box[0]


def broadcast_on_cpu(tensor: Tensor, src: int = 0) -> None:
    """Fill a contiguous CPU tensor, of the same shape and dtype on every rank, with that of rank ``src``."""
    if is_distributed():
        dist.broadcast(tensor, src=src, group=_object_group())


def on_main_process(work: Callable[[], Result]) -> Result:
    """What ``work()`` returns on rank 0 (picklable), on every rank; for quick work, see ``gather_results`` for other.

    Raises:
        Exception: where ``work`` raises: on rank 0 its error, on the others a copy, or a RuntimeError with its text where
            it has none, so that nobody waits for a process that has given up.
    """
    if not is_distributed():
        return work()
    outcome = _Outcome.of(work) if is_main_process() else None
    shared = broadcast_object(outcome and outcome.shared())
    return (outcome or _Outcome(*shared)).result()


def gather_results(work: Callable[[], Result]) -> list[Result]:
    """What ``work()`` returns on each rank (picklable), in rank order, on every rank, however long one of them takes.

    A collective alone would give up after its time limit. So ``work`` runs in a thread, which has torch's default modes (no
    inference mode), and the processes tell each other every ``HEARTBEAT_SECONDS`` that they are alive.

    Raises:
        Exception: the first error in rank order, as in ``on_main_process``.
    """
    if not is_distributed():
        return [work()]
    outcomes: list[_Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(_Outcome.of(work)), daemon=True)
    thread.start()
    while True:
        thread.join(HEARTBEAT_SECONDS)
        parts = all_gather(None if thread.is_alive() else outcomes[0].shared())
        if all(part is not None for part in parts):
            break
    return [(outcomes[0] if rank == get_rank() else _Outcome(*part)).result() for rank, part in enumerate(parts)]


class _Outcome:
    """What a call gave: a value or an error."""

    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self.value = value
        self.error = error

    @classmethod
    def of(cls, work: Callable[[], Any]) -> _Outcome:
        try:
            return cls(work())
        except Exception as error:
            return cls(error=error)

    def shared(self) -> tuple[Any, Exception | None]:
        """Arguments of a copy in another process."""
        return self.value, None if self.error is None else _with_copy(self.error)

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def _with_copy(error: Exception) -> Exception:
    """The error, or one with its text if it cannot be pickled and made again."""
    try:
        pickle.loads(pickle.dumps(error))  # of an object of this process
    except Exception:  # whatever __reduce__ or __init__ of a foreign class raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def shared_random_seed() -> int:
    """A fresh seed in [0, 2**31) that is the same on every rank."""
    return int(broadcast_object(int.from_bytes(os.urandom(4), "little") >> 1))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks as a new tensor; no gradient flows through it."""
    output = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(output)
    return output


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks as a new tensor; no gradient flows through it."""
    output = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(output, op=dist.ReduceOp.MAX)
    return output


def reduce_dict(values: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or mean over ranks of a dict of scalar tensors with the same keys on every rank; all ranks get it."""
    if not values:
        return {}
    names = sorted(values)
    stacked = all_reduce_sum(torch.stack([values[name].detach().float() for name in names]))
    if average:
        stacked = stacked / get_world_size()
    return dict(zip(names, stacked, strict=True))


class _AllGatherWithGrad(torch.autograd.Function):
    """Forward: concatenate over ranks. Backward: sum the gradients of all ranks, keep this rank's rows.

    With losses averaged over ranks (as DDP averages gradients) this gives the gradient of the global loss,
    also through rows that other ranks used.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = tensor.shape[0]
        parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = all_reduce_sum(grad.contiguous())
        start = get_rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """[n, ...] on each rank (same n) -> [world * n, ...], rank-major, differentiable.

    At world size 1 it returns its argument.
    """
    if not is_distributed():
        return tensor
    return _AllGatherWithGrad.apply(tensor)
