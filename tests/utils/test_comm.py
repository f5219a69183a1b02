"""World size 1 in this process; world size 2 in two spawned gloo processes, all checks in one spawn."""

from __future__ import annotations

import datetime
import os
import pickle
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from dinoengine.utils import comm

WORLD_SIZE = 2


# ------------------------------------------------------------------------------------------------ world size 1


def test_alone_there_is_one_process_of_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")  # left behind by another launcher
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()) == (1, 0, 0, 1)
    assert comm.is_main_process()
    assert not comm.is_distributed()
    comm.synchronize()


def test_alone_objects_come_back() -> None:
    data = {"a": [1, 2]}
    assert comm.all_gather(data) == [data]
    assert comm.gather(data) == [data]
    assert comm.broadcast_object(data) is data
    assert comm.on_main_process(lambda: data) is data
    assert comm.gather_results(lambda: data) == [data]


def test_alone_the_main_process_runs_and_raises() -> None:
    assert comm.on_main_process(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        comm.on_main_process(lambda: 1 // 0)


def test_alone_reductions_keep_the_values() -> None:
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(comm.all_reduce_sum(x), x)
    assert torch.equal(comm.all_reduce_max(x), x)
    assert comm.all_gather_with_grad(x) is x
    assert comm.reduce_dict({}) == {}
    assert {k: v.item() for k, v in comm.reduce_dict({"b": x[1], "a": x[0]}).items()} == {"a": 1.0, "b": -2.0}


@pytest.mark.parametrize("reduce", [comm.all_reduce_sum, comm.all_reduce_max])
def test_alone_reductions_give_a_new_tensor_without_gradient_too(
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = torch.ones(3, requires_grad=True)
    y = reduce(x)
    assert not y.requires_grad
    assert y.data_ptr() != x.data_ptr()


def test_a_shared_seed_is_fresh_and_in_range() -> None:
    seeds = {comm.shared_random_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)


# ------------------------------------------------------------------------------------------------ world size 2
# Each check runs on every rank; results of a collective are compared only after it, so no rank waits in vain.


def _check_ranks(rank: int, folder: Path) -> None:
    assert comm.is_distributed()
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()) == (2, rank, rank, 2)
    assert comm.is_main_process() == (rank == 0)


def _check_synchronize(rank: int, folder: Path) -> None:
    if rank == 1:
        time.sleep(0.2)
        (folder / "arrived").touch()
    comm.synchronize()
    assert (folder / "arrived").exists()


def _check_all_gather(rank: int, folder: Path) -> None:
    data = comm.all_gather({"rank": rank, "payload": "x" * (1 + 5000 * rank)})  # of different sizes
    assert [entry["rank"] for entry in data] == [0, 1]
    assert [len(entry["payload"]) for entry in data] == [1, 5001]


def _check_gather(rank: int, folder: Path) -> None:
    for dst in (0, 1):
        data = comm.gather(("from", rank), dst=dst)
        assert data == ([("from", 0), ("from", 1)] if rank == dst else [])


def _check_broadcast_object(rank: int, folder: Path) -> None:
    for src in (0, 1):
        assert comm.broadcast_object({"rank": rank}, src=src) == {"rank": src}


def _check_shared_random_seed(rank: int, folder: Path) -> None:
    seeds = [comm.shared_random_seed() for _ in range(3)]
    assert comm.all_gather(seeds) == [seeds, seeds]
    assert len(set(seeds)) == 3


def _check_all_reduce(rank: int, folder: Path) -> None:
    x = torch.tensor([1.0 + rank, -5.0 * rank], requires_grad=True)
    total, largest = comm.all_reduce_sum(x), comm.all_reduce_max(x)
    assert total.tolist() == [3.0, -5.0]
    assert largest.tolist() == [2.0, 0.0]
    assert x.tolist() == [1.0 + rank, -5.0 * rank]  # the argument is untouched
    assert not total.requires_grad
    assert not largest.requires_grad


def _check_reductions_of_unusual_layouts(rank: int, folder: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3) + 10 * rank
    assert torch.equal(comm.all_reduce_sum(x.t()), (torch.arange(6.0).reshape(2, 3) * 2 + 10).t())
    assert comm.all_reduce_sum(torch.ones(1).expand(4)).tolist() == [2.0] * 4
    assert comm.all_reduce_sum(torch.tensor(rank)).item() == 1  # 0-d, integer
    assert comm.all_reduce_max(torch.zeros(0)).shape == (0,)


def _check_reduce_dict(rank: int, folder: Path) -> None:
    values = {"a": torch.tensor(1.0 + rank), "b": torch.tensor(10 * rank), "c": torch.tensor(2.0, requires_grad=True)}
    if rank == 1:
        values = dict(reversed(values.items()))  # the order of the keys does not matter
    mean, total = comm.reduce_dict(values), comm.reduce_dict(values, average=False)
    assert {name: value.item() for name, value in mean.items()} == {"a": 1.5, "b": 5.0, "c": 2.0}
    assert {name: value.item() for name, value in total.items()} == {"a": 3.0, "b": 10.0, "c": 4.0}
    assert not mean["c"].requires_grad
    assert comm.reduce_dict({}) == {}


def _check_gather_with_grad_values(rank: int, folder: Path) -> None:
    for shape in [(3,), (2, 3), (1, 2, 2), (0, 4)]:
        parts = [torch.randn(shape, generator=torch.Generator().manual_seed(r)) for r in range(WORLD_SIZE)]
        assert torch.equal(comm.all_gather_with_grad(parts[rank]), torch.cat(parts))
    transposed = torch.arange(6.0).reshape(2, 3).t() + 10 * rank
    expected = torch.cat([torch.arange(6.0).reshape(2, 3).t() + 10 * r for r in range(WORLD_SIZE)])
    assert torch.equal(comm.all_gather_with_grad(transposed), expected)


def _rank_loss(own: torch.Tensor, everything: torch.Tensor) -> torch.Tensor:
    """A loss of one rank that depends on the rows of all ranks, unevenly."""
    return ((own @ everything.t()).cos() * torch.arange(1.0, 1 + len(everything), dtype=own.dtype)).mean()


def _check_gather_with_grad_gradient(rank: int, folder: Path) -> None:
    # Gradient of the mean of the ranks' losses with respect to a shared weight: once on one process, once as DDP
    # does it (each rank backward through its own loss, gradients averaged).
    inputs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(2)]
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()

    rows = [x @ weight for x in inputs]
    reference_loss = torch.stack([_rank_loss(own, torch.cat(rows)) for own in rows]).mean()
    (reference,) = torch.autograd.grad(reference_loss, weight)

    own = inputs[rank] @ weight
    (gradient,) = torch.autograd.grad(_rank_loss(own, comm.all_gather_with_grad(own)), weight)
    averaged = comm.all_reduce_sum(gradient) / WORLD_SIZE
    assert torch.allclose(averaged, reference, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(gradient, averaged)  # the check has teeth: the ranks' own gradients differ


def _check_gather_with_grad_of_a_strided_gradient(rank: int, folder: Path) -> None:
    x = torch.full((2, 3), float(rank), requires_grad=True)
    comm.all_gather_with_grad(x).sum().backward()  # the gradient of sum() is expanded, not contiguous
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0] * 3] * 2  # each of the two ranks' losses uses each row once


def _check_second_group(rank: int, folder: Path) -> None:
    comm.destroy_process_group()
    assert comm.get_world_size() == 1
    assert comm.all_gather(rank) == [rank]
    _open_group(rank, folder / "second")
    assert comm.all_gather(rank) == [0, 1]  # not through the group that is gone


class _OwnError(Exception):
    def __init__(self, one: str, other: str) -> None:  # takes more than a text, so it cannot be unpickled
        super().__init__(f"{one} and {other}")


def _check_on_main_process(rank: int, folder: Path) -> None:
    assert comm.on_main_process(lambda: ["from", comm.get_rank()]) == ["from", 0]

    def fail() -> None:
        (folder / f"worked_on_{rank}").touch()
        raise FileNotFoundError("no such file: x")

    with pytest.raises(FileNotFoundError, match=r"^no such file: x$"):
        comm.on_main_process(fail)
    assert not (folder / "worked_on_1").exists()

    def fail_otherwise() -> None:
        raise _OwnError("a", "b")

    expected = _OwnError if rank == 0 else RuntimeError
    with pytest.raises(expected, match=r"^a and b$" if rank == 0 else r"^_OwnError: a and b$"):
        comm.on_main_process(fail_otherwise)


def _check_gather_results_of_slow_work(rank: int, folder: Path) -> None:
    """No collective may take as long as the work does: those that wait take part in one per heartbeat."""
    rounds = []
    plain, comm.all_gather = comm.all_gather, lambda data: rounds.append(data) or plain(data)  # type: ignore[func-returns-value]
    heartbeat, comm.HEARTBEAT_SECONDS = comm.HEARTBEAT_SECONDS, 0.1
    try:
        assert comm.gather_results(lambda: time.sleep(1.0 * rank) or rank) == [0, 1]  # type: ignore[func-returns-value]
    finally:
        comm.all_gather, comm.HEARTBEAT_SECONDS = plain, heartbeat
    assert len(rounds) >= 3
    assert (rounds[0] is None) == (rank == 1)


def _check_gather_results_with_an_error(rank: int, folder: Path) -> None:
    def work() -> int:
        if rank == 1:
            raise ValueError("one is broken")
        return rank

    with pytest.raises(ValueError, match=r"^one is broken$"):
        comm.gather_results(work)


CHECKS: dict[str, Callable[[int, Path], None]] = {
    check.__name__.removeprefix("_check_"): check
    for check in (
        _check_ranks,
        _check_synchronize,
        _check_all_gather,
        _check_gather,
        _check_broadcast_object,
        _check_on_main_process,
        _check_shared_random_seed,
        _check_all_reduce,
        _check_reductions_of_unusual_layouts,
        _check_reduce_dict,
        _check_gather_with_grad_values,
        _check_gather_with_grad_gradient,
        _check_gather_with_grad_of_a_strided_gradient,
        _check_gather_results_of_slow_work,
        _check_gather_results_with_an_error,
        _check_second_group,  # last: it replaces the process group
    )
}


def _open_group(rank: int, file: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=60),
    )


def _run_checks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD_SIZE))
    _open_group(rank, folder / "first")
    failures: dict[str, str] = {}
    for name, check in CHECKS.items():
        try:
            check(rank, folder)
            failures[name] = ""
        except Exception:
            failures[name] = traceback.format_exc()
        (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(failures))
    comm.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("comm")
    multiprocessing.spawn(_run_checks, args=(folder,), nprocs=WORLD_SIZE)
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(WORLD_SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHECKS))
def test_with_two_processes(name: str, failures: list[dict[str, str]]) -> None:
    for rank, of_rank in enumerate(failures):
        assert not of_rank[name], f"rank {rank}:\n{of_rank[name]}"


def test_nothing_holds_a_group_that_has_ended() -> None:
    """What holds it is destroyed at interpreter exit, where its threads may abort the process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        comm._object_group()
        group = weakref.ref(dist.group.WORLD)
    finally:
        comm.destroy_process_group()
    assert group() is None


def test_objects_wait_as_long_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside nccl they have a group of their own."""
    monkeypatch.setattr(dist, "get_backend", lambda *_: dist.Backend.NCCL)
    comm.init_process_group("gloo", timedelta(hours=3), store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = comm._object_group()
        assert group is not dist.group.WORLD
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=3)
    finally:
        comm.destroy_process_group()
