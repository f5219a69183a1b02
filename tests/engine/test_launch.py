"""Starting processes, joining torchrun's, and what comes back."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from dinoengine.engine import TrainerBase, hooks, launch
from dinoengine.engine.launch import free_port
from dinoengine.engine.torchrun import under_torchrun
from dinoengine.utils import comm
from tests.engine.toys import toy_trainer


def _add(a: int, b: int) -> int:
    return a + b


def _note_and_exit(folder: str) -> None:
    place = [comm.get_rank(), comm.get_local_rank(), comm.get_local_size(), comm.get_world_size()]
    Path(folder, "-".join(map(str, place))).write_text(multiprocessing.get_start_method())
    comm.synchronize()
    raise SystemExit(3)


def _describe() -> tuple[int, int]:
    return comm.get_rank(), comm.get_world_size()


def test_one_process_runs_here_and_its_value_comes_back() -> None:
    assert launch(_add, 1, args=(2, 3), device="cpu") == 5


@pytest.mark.slow
def test_spawned_processes_know_their_place_and_their_exit_code_is_ours(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        launch(_note_and_exit, 2, args=(str(tmp_path),), device="cpu")
    assert done.value.code == 3
    assert sorted(os.listdir(tmp_path)) == ["0-0-2-2", "1-1-2-2"]
    # Workers of loaders start as in a process that nobody spawned.
    assert {path.read_text() for path in tmp_path.iterdir()} == {multiprocessing.get_start_method()}


def test_several_machines_need_an_address() -> None:
    with pytest.raises(ValueError, match="Several machines need --dist-url tcp://"):
        launch(_add, 1, num_machines=2, args=(1, 2), device="cpu")


@pytest.mark.slow
def test_processes_that_do_not_come_are_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(SystemExit) as ended:
        launch(_add, 1, num_machines=2, dist_url=url, args=(1, 2), device="cpu", timeout=timedelta(seconds=1))
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert f"error: Process 0 of 2 did not find the others at {url} within 1 s (" in error
    assert "Traceback" not in error


def test_torchrun_is_recognised_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not under_torchrun()
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, value in {**environment, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert under_torchrun()
    assert launch(_describe, 8, device="cpu") == (0, 1)  # torchrun decides the number of processes
    assert comm.get_world_size() == 1


def _train_with_a_hook_that_fails_on_rank_1(folder: str) -> None:
    trainer = toy_trainer()
    ends = hooks.CallbackHook(after_train=lambda t: (Path(folder) / f"ended{comm.get_rank()}").touch())
    trainer.register_hooks([ends, hooks.CallbackHook(before_step=_fail_on_rank_1)])
    trainer.train(0, 10**6)


def _fail_on_rank_1(trainer: TrainerBase) -> None:
    if trainer.iter == 3 and comm.get_rank() == 1:
        raise ValueError("a hook of rank 1 fails")


@pytest.mark.slow
def test_a_hook_that_fails_on_one_rank_ends_the_others_and_is_the_error_reported(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match="ValueError: a hook of rank 1 fails"):
        launch(_train_with_a_hook_that_fails_on_rank_1, 2, args=(str(tmp_path),), device="cpu")
    assert sorted(os.listdir(tmp_path)) == ["ended0", "ended1"]
