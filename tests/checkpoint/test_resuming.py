"""A resume continues from the newest checkpoint that is good, on all processes from the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointError, periodic_checkpoints, read_checkpoint, resumable
from dinoengine.checkpoint.files import UnreadableCheckpointError
from dinoengine.checkpoint.resuming import checkpoint_name, final_checkpoint, iteration_of, shown
from dinoengine.engine import launch
from dinoengine.utils import comm


def _checkpointer(folder: Path, value: float = 0.0) -> Checkpointer:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return Checkpointer(model, str(folder))


def _run(folder: Path, iterations: tuple[int, ...] = (9, 19, 29)) -> None:
    """Checkpoints whose weight is their iteration."""
    for iteration in iterations:
        _checkpointer(folder, iteration).save(f"model_{iteration:07d}", iteration=iteration)


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b""
    path.write_bytes(content)


def _resume(folder: Path) -> tuple[int, float]:
    checkpointer = _checkpointer(folder, -1)
    start = checkpointer.resume_or_load("", resume=True)
    return start, next(checkpointer.model.parameters()).item()


def test_periodic_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    for name in (
        "model_0000010.pth",
        "model_0000002.pth",
        "model_final.pth",
        "model_best.pth",
        "model_12.pth",
        "x.pth",
    ):
        (tmp_path / name).touch()
    assert [os.path.basename(p) for p in periodic_checkpoints(str(tmp_path)).values()] == [
        "model_0000002.pth",
        "model_0000010.pth",
    ]


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [
        ("model_0000019.pth", ["model_0000019.pth", "model_0000009.pth"]),  # 29 is of a run that went back
        ("model_final.pth", ["model_final.pth", "model_0000029.pth", "model_0000019.pth", "model_0000009.pth"]),
        (None, ["model_0000029.pth", "model_0000019.pth", "model_0000009.pth"]),
        ("model_0000005.pth", ["model_0000005.pth"]),
    ],
)
def test_what_is_tried_in_which_order(tmp_path: Path, pointer: str | None, expected: list[str]) -> None:
    for name in (
        "model_0000029.pth",
        "model_0000009.pth",
        "model_0000019.pth",
        "model_best.pth",
        "damaged_0000039.pth",
    ):
        (tmp_path / name).touch()
    if pointer is not None:
        (tmp_path / "last_checkpoint").write_text(pointer)
    assert resumable(str(tmp_path)) == expected


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert resumable(str(tmp_path)) == resumable(str(tmp_path / "gone")) == []
    assert not _checkpointer(tmp_path).has_checkpoint()


def test_a_damaged_last_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(tmp_path)
    _damage(tmp_path / "model_0000029.pth")
    assert _resume(tmp_path) == (20, 19.0)
    assert "model_0000029.pth cannot be read" in caplog.text
    assert "10 iteration(s) are done again, from iteration 20 on" in caplog.text
    assert sorted(os.listdir(tmp_path)) == [
        "damaged_0000029.pth",
        "last_checkpoint",
        "model_0000009.pth",
        "model_0000019.pth",
    ]
    caplog.clear()
    assert _resume(tmp_path) == (20, 19.0)  # it is the last one now
    assert "cannot be used" not in caplog.text


def test_several_damaged_ones_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _run(tmp_path)
    _checkpointer(tmp_path, 34).save("model_final", iteration=34)
    _damage(tmp_path / "model_final.pth")
    _damage(tmp_path / "model_0000019.pth")
    (tmp_path / "model_0000029.pth").write_bytes(b"")
    assert _resume(tmp_path) == (10, 9.0)
    assert "The iterations since are done again, from iteration 10 on" in caplog.text
    assert sorted(os.listdir(tmp_path)) == [
        "damaged_0000019.pth",
        "damaged_0000029.pth",
        "damaged_final.pth",
        "last_checkpoint",
        "model_0000009.pth",
    ]


def test_a_pointer_to_a_file_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _run(tmp_path)
    (tmp_path / "model_0000029.pth").unlink()
    with pytest.raises(CheckpointError, match=r"names model_0000029\.pth, which is not there"):
        _checkpointer(tmp_path).get_checkpoint_file()  # what an evaluation asks for must be what it gets
    assert _resume(tmp_path) == (20, 19.0)
    assert "model_0000029.pth is not there" in caplog.text


def test_a_lost_pointer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The process may have died between its first file and the pointer; that work is not lost."""
    _run(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    assert _resume(tmp_path) == (30, 29.0)
    assert "last_checkpoint is missing" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000029.pth"


def test_none_is_good(tmp_path: Path) -> None:
    _run(tmp_path, (9, 19))
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    (tmp_path / "model_0000019.pth").unlink()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(
        UnreadableCheckpointError,
        match=r"tried, newest first:\n  model_0000019\.pth is not there\.\n.*model_0000009\.pth cannot be read",
    ):
        _resume(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_what_does_not_fit_is_no_damage(tmp_path: Path) -> None:
    """A resume with another model must not go back step by step through all checkpoints."""
    _run(tmp_path)
    with pytest.raises(CheckpointError, match="of another shape"):
        Checkpointer(nn.Linear(2, 1, bias=False), str(tmp_path)).resume_or_load("", resume=True)
    torch.save({"model": nn.Linear(1, 1, bias=False).state_dict()}, tmp_path / "model_0000029.pth")
    with pytest.raises(CheckpointError, match="it says no iteration"):
        _resume(tmp_path)
    assert "damaged_0000029.pth" not in os.listdir(tmp_path)


def _on_a_rank(folder: str) -> None:
    """Rank 1 finds the last file damaged; and an error in saving is one on both ranks."""
    if comm.get_rank() == 1:
        import dinoengine.checkpoint.resuming as resuming

        def read(path: str) -> dict[str, Any]:
            if path.endswith("29.pth"):
                raise UnreadableCheckpointError(f"{path} cannot be read")
            return read_checkpoint(path)

        resuming.read_checkpoint = read  # type: ignore[assignment]
    result = _resume(Path(folder))
    assert comm.all_gather(result) == [(20, 19.0)] * 2
    assert sorted(os.listdir(folder)) == [
        "last_checkpoint",
        "model_0000009.pth",
        "model_0000019.pth",
        "model_0000029.pth",  # rank 0 could read it, so it stays
    ]
    comm.synchronize()
    checkpointer = Checkpointer(nn.Linear(1, 1), os.path.join(folder, "last_checkpoint"))  # a file, not a folder
    with pytest.raises(OSError, match="could not be written: .*is a file now"):
        checkpointer.save("model_0000039", iteration=39)
    checkpointer.save_dir = folder
    checkpointer.save("model_0000039", iteration=39, background=True)
    checkpointer.wait()
    assert Path(folder, "last_checkpoint").read_text() == "model_0000039.pth"


@pytest.mark.slow
def test_all_processes_take_the_same_one(tmp_path: Path) -> None:
    _run(tmp_path)
    launch(_on_a_rank, 2, args=(str(tmp_path),), device="cpu")


@pytest.mark.parametrize("junk", [b"\x00\xff" * 5000, b"a b\x1b[31m\n" * 50, b"x" * 5000])
def test_a_pointer_of_junk_is_shown_short_and_quoted(
    tmp_path: Path, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 1), str(tmp_path))
    checkpointer.save("model_0000003", iteration=3)
    (tmp_path / "last_checkpoint").write_bytes(junk)
    with pytest.raises(CheckpointError, match=r"names '.{1,400}'\.\.\., which is not there"):
        checkpointer.get_checkpoint_file()
    assert checkpointer.resume_or_load("") == 4
    assert "'... is not there" in caplog.text
    assert len(caplog.text) < 1500
    assert "\x1b" not in caplog.text


def test_a_pointer_to_a_path_is_shown_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _run(tmp_path)
    (tmp_path / "last_checkpoint").write_text("../../etc/passwd")
    assert _resume(tmp_path) == (30, 29.0)
    assert "last_checkpoint holds '../../etc/passwd', which is no name of a checkpoint" in caplog.text


def test_a_pointer_to_another_file_of_the_run_changes_that_file_in_nothing(tmp_path: Path) -> None:
    _run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "last_checkpoint").write_text("metrics.json")
    assert _resume(tmp_path) == (30, 29.0)
    assert (tmp_path / "metrics.json").read_text() == "{}"
    assert not list(tmp_path.glob("damaged_*"))


def test_swapped_files_are_told_by_what_they_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _run(tmp_path)
    (tmp_path / "model_0000029.pth").rename(tmp_path / "t")
    (tmp_path / "model_0000019.pth").rename(tmp_path / "model_0000029.pth")
    (tmp_path / "t").rename(tmp_path / "model_0000019.pth")
    assert _resume(tmp_path) == (20, 19.0)
    assert "model_0000029.pth is of iteration 19: it was renamed, or another was copied over it" in caplog.text


def test_the_checkpoint_of_a_finished_run(tmp_path: Path) -> None:
    assert final_checkpoint(str(tmp_path)) == ""
    _checkpointer(tmp_path).save("model_final", iteration=29)
    assert final_checkpoint(str(tmp_path)) == str(tmp_path / "model_final.pth")


def test_names_of_checkpoints_are_read_as_they_are_made() -> None:
    assert [iteration_of(f"{checkpoint_name(i)}.pth") for i in (0, 9_999_999, 10_000_000)] == [0, 9_999_999, 10_000_000]
    assert shown(f"{checkpoint_name(7)}.pth") == "model_0000007.pth"
