"""Data workers that are killed, die by themselves, or hang: real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dinoengine.data.samplers import PositionBatches
from dinoengine.engine import SimpleTrainer, hooks
from dinoengine.engine.fetching import MAX_FAILURES, BatchFetcher, WorkerFailureError
from tests.engine.toys import ToyData, ToyModel, toy_trainer


class _Stream(Dataset[torch.Tensor]):
    """Position -> four numbers; at position 20, a fault as often as there are files to take away."""

    def __init__(self, faults: Path, fault: Callable[[], Any]) -> None:
        self.faults = faults
        self.fault = fault

    def __getitem__(self, position: int) -> torch.Tensor:
        if position == 20 and (left := sorted(os.listdir(self.faults))):
            (self.faults / left[0]).unlink()
            self.fault()
        return torch.randn(4, generator=torch.Generator().manual_seed(position))


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _bus_error() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def _hangs() -> None:
    time.sleep(1000)


def _fails() -> None:
    raise RuntimeError("the code of a worker fails")


def _ignore_first_sigterm(worker_id: int) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: None)


def _loader(folder: Path, fault: Callable[[], Any] = _killed, num_faults: int = 0, timeout: int = 0) -> DataLoader[Any]:
    folder.mkdir(exist_ok=True)
    for i in range(num_faults):
        (folder / str(i)).touch()
    batches = PositionBatches(4)
    return DataLoader(
        _Stream(folder, fault),
        batch_sampler=batches,
        num_workers=2,
        timeout=timeout,
        worker_init_fn=_ignore_first_sigterm,
    )


def _train(loader: Any, *more: hooks.CallbackHook) -> torch.Tensor:
    model = ToyModel()
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), seed=0)
    trainer.register_hooks(more)
    trainer.train(0, 9)
    trainer.close_data_loader()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return _train(_loader(tmp_path_factory.mktemp("none")))


@pytest.mark.parametrize(
    ("fault", "num_faults", "timeout", "text"),
    [
        (_killed, 2, 0, "was ended by SIGKILL in iteration"),
        (_bus_error, 1, 0, "was ended by SIGBUS in iteration"),
        (_hangs, 1, 1, "timed out after 1 seconds in iteration 5. Starting the data workers anew at this iteration"),
    ],
)
def test_a_worker_that_fails_costs_nothing_but_time(
    tmp_path: Path,
    undisturbed: torch.Tensor,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[], Any],
    num_faults: int,
    timeout: int,
    text: str,
) -> None:
    assert torch.equal(_train(_loader(tmp_path, fault, num_faults, timeout)), undisturbed)
    assert caplog.text.count(text) == num_faults
    assert not list(tmp_path.iterdir())


def test_a_worker_killed_during_a_step_interrupts_no_step(
    tmp_path: Path, undisturbed: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """The main thread gets SIGCHLD within a hook; torch's own handler would raise there."""
    passed: list[int] = []

    def kill_a_worker(trainer: SimpleTrainer) -> None:
        if trainer.iter == 3:
            worker = trainer._batches.fetcher._workers[0]  # type: ignore[union-attr]
            os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
            while worker.is_alive():
                time.sleep(0.01)
        passed.append(trainer.iter)

    weights = _train(_loader(tmp_path), hooks.CallbackHook(before_optimizer_step=kill_a_worker))
    assert torch.equal(weights, undisturbed)
    assert passed == list(range(9))
    assert "was ended by SIGKILL in iteration 4. Starting" in caplog.text


def test_workers_that_always_die_end_the_run_with_the_usual_causes(tmp_path: Path) -> None:
    with pytest.raises(
        WorkerFailureError, match=r"ended by SIGKILL in iteration \d, 4 time\(s\) .* memory .* /dev/shm"
    ):
        _train(_loader(tmp_path, _killed, MAX_FAILURES + 5))
    assert len(list(tmp_path.iterdir())) == 4


def test_an_error_in_the_code_of_a_worker_is_reported_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the code of a worker fails"):
        _train(_loader(tmp_path, _fails, 1))


def test_a_loader_that_cannot_start_within_its_data_is_not_started_anew(tmp_path: Path) -> None:
    (tmp_path / "0").touch()
    loader = DataLoader(_Stream(tmp_path, _killed), batch_size=4, sampler=range(100), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(WorkerFailureError, match=r"1 time\(s\)"):
        list(map(BatchFetcher(loader).fetch, range(6)))


def test_a_loader_that_ends_says_so() -> None:
    fetcher = BatchFetcher([1, 2])
    assert [fetcher.fetch(0), fetcher.fetch(1)] == [1, 2]
    with pytest.raises(RuntimeError, match="ended in iteration 2; it must be endless"):
        fetcher.fetch(2)


def test_a_trainer_can_be_given_another_loader() -> None:
    trainer = toy_trainer()
    trainer.train(0, 3)
    trainer.reset_data_loader(lambda: ToyData(bad_iters=(0,)))
    with pytest.raises(FloatingPointError):
        trainer.train(3, 4)


def test_a_worker_whose_end_is_seen_before_its_exit_code_is_named_by_its_signal(tmp_path: Path) -> None:
    """The pipe that tells of its end closes first; a broken connection is reported in between."""
    fetcher = BatchFetcher(_loader(tmp_path))
    fetcher.fetch(0)
    worker = fetcher._workers[0]
    popen = worker._popen  # type: ignore[attr-defined]
    poll = popen.poll
    popen.poll = lambda flag=os.WNOHANG: None if flag == os.WNOHANG and popen.returncode is None else poll(flag)
    os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    assert wait([worker.sentinel], timeout=10)
    assert "was ended by SIGKILL" in fetcher._describe(ConnectionResetError(104, "Connection reset by peer"))
    fetcher._abandon()  # the killed worker may have held a lock that the other waits for
