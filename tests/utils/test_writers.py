from __future__ import annotations

import io
import json
import logging
import math
import re
import resource
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoengine.utils.events import EventStorage
from dinoengine.utils.logger import setup_logger
from dinoengine.utils.writers import ConsoleWriter, EventWriter, JSONWriter, TensorboardXWriter, peak_memory_mib


def _rows(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def _train(storage: EventStorage, writers: list[EventWriter], iterations: range, period: int) -> None:
    for i in iterations:
        storage.iter = i
        storage.put_scalar("loss", i / 2, role="loss")
        if (i + 1) % period == 0 or i == iterations.stop - 1:
            for writer in writers:
                writer.write()


# ------------------------------------------------------------------------------------------------ JSON


def test_every_value_gets_into_the_row_of_its_iteration(tmp_path: Path) -> None:
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        _train(storage, [writer], range(50), period=20)
    writer.close()
    assert _rows(tmp_path / "metrics.json") == [{"iteration": i, "loss": i / 2} for i in range(50)]


def test_scalars_of_other_periods_share_rows_or_get_their_own(tmp_path: Path) -> None:
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        for i in range(60):
            storage.iter = i
            if (i + 1) % 20 == 0:
                storage.put_scalar("twenty", i)
            if (i + 3) % 20 == 0:
                storage.put_scalar("other", i, smoothing_hint=False)
            if (i + 1) % 20 == 0 or (i + 1) % 30 == 0:
                storage.put_scalar("both", i)
                writer.write()
    writer.close()
    rows = _rows(tmp_path / "metrics.json")
    assert [row["iteration"] for row in rows] == [17, 19, 29, 37, 39, 57, 59]
    assert rows[-1] == {"iteration": 59, "twenty": 59.0, "both": 59.0}


def test_late_values_are_written_to_a_row_of_their_own_iteration(tmp_path: Path) -> None:
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(19) as storage:
        storage.put_scalar("lr", 0.1)
        writer.write()
        storage.iter = 20
        storage.put_scalar("lr", 0.2)
        storage.put_scalar("loss", 5.0, cur_iter=19)  # arrives after its row was written
        storage.put_scalar("loss", 4.0, cur_iter=3)
        writer.write()
        writer.write()  # nothing new: no row
    writer.close()
    assert _rows(tmp_path / "metrics.json") == [
        {"iteration": 19, "lr": 0.1},
        {"iteration": 3, "loss": 4.0},
        {"iteration": 19, "loss": 5.0},
        {"iteration": 20, "lr": 0.2},
    ]


def test_values_put_for_max_iter_after_training_make_the_last_row(tmp_path: Path) -> None:
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        _train(storage, [writer], range(10), period=4)
        storage.iter = 10
        storage.put_scalar("knn/top1_k20", 93.5, smoothing_hint=False, role="eval")
        writer.write()
    writer.close()
    assert _rows(tmp_path / "metrics.json")[-1] == {"iteration": 10, "knn/top1_k20": 93.5}


def test_keys_are_sorted_and_non_finite_values_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage(2) as storage:
        storage.put_scalars({"z": math.nan, "a": math.inf, "m": -math.inf, "k": 1e300})
        writer.write()
    writer.close()
    assert path.read_text() == '{"a": null, "iteration": 2, "k": 1e+300, "m": null, "z": null}\n'


def test_rows_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        _train(storage, [writer], range(4), period=4)
        assert len(_rows(tmp_path / "metrics.json")) == 4
    writer.close()


@pytest.mark.parametrize("start_iter", [0, 7, 20, 25])
def test_a_resumed_run_writes_each_iteration_once(tmp_path: Path, start_iter: int) -> None:
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage(0) as storage:
        _train(storage, [writer], range(20), period=5)
        storage.iter = 20
        storage.put_scalar("knn", 90.0, role="eval")
        writer.write()
    writer.close()
    writer = JSONWriter(str(path), start_iter=start_iter)
    with EventStorage(start_iter) as storage:
        _train(storage, [writer], range(start_iter, 30), period=5)
    writer.close()
    rows = _rows(path)
    assert [row["iteration"] for row in rows] == [*range(min(start_iter, 21)), *range(start_iter, 30)]
    assert ({"iteration": 20, "knn": 90.0} in rows) == (start_iter > 20)


@pytest.mark.parametrize("written_until", [20, 40])
def test_values_of_the_checkpoint_that_never_reached_the_file_are_written_by_the_next_run(
    tmp_path: Path, written_until: int
) -> None:
    # The run before wrote rows up to ``written_until``, saved a checkpoint after iteration 29, and was killed.
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage(0) as storage:
        _train(storage, [writer], range(20), period=20)
        _train(storage, [], range(20, 30), period=20)
        state = storage.state_dict()
        _train(storage, [writer] if written_until == 40 else [], range(30, 40), period=20)
    writer.close()
    assert len(_rows(path)) == written_until

    writer = JSONWriter(str(path), start_iter=30)
    with EventStorage(30) as storage:
        storage.load_state_dict(state)
        _train(storage, [writer], range(30, 45), period=20)
    writer.close()
    assert _rows(path) == [{"iteration": i, "loss": i / 2} for i in range(45)]


def test_tensorboard_does_not_repeat_restored_values(tmp_path: Path) -> None:
    with EventStorage(0) as storage:
        _train(storage, [], range(5), period=5)
        state = storage.state_dict()
    writer = TensorboardXWriter(str(tmp_path / "tb"))
    with EventStorage(5) as storage:
        storage.load_state_dict(state)
        storage.put_image("crops", np.zeros((2, 2, 3), np.uint8))
        _train(storage, [writer], range(5, 7), period=1)
    writer.close()
    steps = [(v.tag, event.step) for event in _events(tmp_path / "tb") for v in event.summary.value]
    assert sorted(steps) == [("crops", 5), ("loss", 5), ("loss", 6)]


def test_tensorboard_gets_what_a_killed_run_had_measured_and_not_written(tmp_path: Path) -> None:
    """Written until 4, a checkpoint after 7, killed; the run that is resumed at 8 has the values of 5 to 7 restored."""
    rows, board = JSONWriter(str(tmp_path / "metrics.json")), TensorboardXWriter(str(tmp_path / "first"))
    with EventStorage(0) as storage:
        _train(storage, [rows, board], range(5), period=5)
        _train(storage, [], range(5, 8), period=5)
        state = storage.state_dict()
    board.close()
    rows = JSONWriter(str(tmp_path / "metrics.json"), start_iter=8)
    assert rows.last_known == 4
    board = TensorboardXWriter(str(tmp_path / "second"), 8, rows.last_known)
    with EventStorage(8) as storage:
        storage.load_state_dict(state)
        board.write()  # nothing new yet; what was restored comes once
        rows.write()
        _train(storage, [rows, board], range(8, 12), period=2)
    board.close()
    steps = sorted(
        event.step for run in ("first", "second") for event in _events(tmp_path / run) for v in event.summary.value
    )
    assert steps == [row["iteration"] for row in _rows(tmp_path / "metrics.json")] == list(range(12))


@pytest.mark.parametrize("damage", ['{"iteration": 4, "lo', "", "\x00\x00\x00", "[1]\n", '{"loss": 3}\n', "\n"])
def test_rows_damaged_by_a_crash_are_dropped_on_resume(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 3, "loss": 1.5}\n' + damage)
    writer = JSONWriter(str(path), start_iter=4)
    with EventStorage(4) as storage:
        _train(storage, [writer], range(4, 6), period=1)
    writer.close()
    assert [row["iteration"] for row in _rows(path)] == [3, 4, 5]


def test_a_last_row_that_lost_only_its_newline_is_closed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 2, "loss": 1.0}\n{"iteration": 3, "loss": 1.5}')
    writer = JSONWriter(str(path), start_iter=4)
    with EventStorage(4) as storage:
        _train(storage, [writer], range(4, 5), period=1)
    writer.close()
    assert [row["iteration"] for row in _rows(path)] in ([2, 3, 4], [2, 4])


def test_a_file_without_rows_to_drop_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 3}\n')
    before = path.stat().st_ino
    JSONWriter(str(path), start_iter=4).close()
    assert path.stat().st_ino == before
    JSONWriter(str(path), start_iter=3).close()  # replaced as a whole, not cut in place
    assert path.stat().st_ino != before
    assert path.read_text() == ""


# ------------------------------------------------------------------------------------------------ console


def _fields(line: str) -> dict[str, str]:
    """``a 1  b 2`` -> {"a": "1", "b": "2"}."""
    return dict(part.split(" ", 1) for part in line.split("  "))


def _step(storage: EventStorage, i: int) -> None:
    storage.iter = i
    storage.put_scalars({"time": 2.0 if i != 3 else 50.0, "data_time": 0.25})
    storage.put_scalars({"loss_dino": float(i), "total_loss": 10.0 * i}, role="loss")
    storage.put_scalars({"grad_norm": 1.0}, role="metric")
    storage.put_scalars({"lr": 1e-3 * i, "momentum": 0.992}, role="schedule", smoothing_hint=False)
    storage.put_scalar("debugging", 1.0)
    storage.put_scalar("knn/top1", 5.0, role="eval")


def test_the_line_has_progress_eta_speed_losses_schedules_and_memory() -> None:
    storage = EventStorage()
    for i in range(10):
        _step(storage, i)
    line = ConsoleWriter(100, images_per_iter=64, window_size=4).line(storage)
    fields = _fields(line)
    memory = fields.pop("mem")
    assert fields == {
        "iter": "10/100",
        "eta": "0:03:00",  # 90 iterations of 2 s; the one of 50 s does not count
        "img/s": "32",
        "time": "2.0000",
        "data": "0.2500",
        "total_loss": "75",  # median of 60, 70, 80, 90
        "loss_dino": "7.5",
        "grad_norm": "1",
        "lr": "0.009",  # not smoothed
        "momentum": "0.992",
    }
    assert list(fields)[:6] == ["iter", "eta", "img/s", "time", "data", "total_loss"]
    assert re.fullmatch(r"\d+M", memory)
    assert "\n" not in line


def test_the_eta_is_the_median_of_the_last_thousand_times() -> None:
    storage = EventStorage()
    for i in range(1500):
        storage.put_scalar("time", 100.0 if i < 997 else 0.5, cur_iter=i)  # 497 of the last 1000 are slow
    storage.iter = 1499
    assert _fields(ConsoleWriter(1500 + 7200).line(storage))["eta"] == "1:00:00"


def test_the_last_line_has_nothing_left_to_do() -> None:
    storage = EventStorage()
    for i in range(10):
        _step(storage, i)
    assert _fields(ConsoleWriter(10).line(storage))["eta"] == "0:00:00"


def test_before_the_first_time_there_is_no_eta_and_no_speed() -> None:
    storage = EventStorage(0)
    storage.put_scalar("total_loss", 3.14159265, role="loss")
    fields = _fields(ConsoleWriter(10, images_per_iter=4).line(storage))
    assert list(fields) == ["iter", "total_loss", "mem"]
    assert fields["total_loss"] == "3.142"


def test_values_put_rarely_are_still_shown() -> None:
    storage = EventStorage(0)
    storage.put_scalar("total_loss", 2.0, role="loss")
    storage.iter = 500
    assert _fields(ConsoleWriter(1000).line(storage))["total_loss"] == "2"


def test_non_finite_losses_and_a_time_of_zero_are_printed() -> None:
    storage = EventStorage(0)
    storage.put_scalars({"total_loss": math.nan, "loss_koleo": math.inf}, role="loss")
    storage.put_scalar("time", 0.0)
    fields = _fields(ConsoleWriter(10, images_per_iter=4).line(storage))
    assert (fields["total_loss"], fields["loss_koleo"]) == ("nan", "inf")
    assert "img/s" not in fields


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_a_non_finite_time_does_not_end_the_run(seconds: float) -> None:
    storage = EventStorage(0)
    storage.put_scalar("time", seconds)
    try:
        assert "iter 1/10" in ConsoleWriter(10).line(storage)
    except (ValueError, OverflowError) as error:
        pytest.fail(str(error))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    writers_logger, handler = logging.getLogger("dinoengine.utils.writers"), Keep()
    level = writers_logger.level
    writers_logger.setLevel(logging.INFO)
    writers_logger.addHandler(handler)
    yield seen
    writers_logger.removeHandler(handler)
    writers_logger.setLevel(level)


def test_one_line_per_write_and_none_after_the_end(logged: list[str]) -> None:
    writer = ConsoleWriter(50)
    with EventStorage(0) as storage:
        _train(storage, [writer], range(50), period=20)
        storage.iter = 50
        writer.write()
    writer.close()
    assert [line.split("  ")[0] for line in logged] == ["iter 20/50", "iter 40/50", "iter 50/50"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def dinoengine_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("dinoengine")
    saved = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers.clear()
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = saved


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals_and_never_breaks_a_log_line(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dinoengine_logger: logging.Logger
) -> None:
    stdout = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    setup_logger(str(tmp_path))
    writer = ConsoleWriter(50, progress_bar=True)
    with EventStorage(0) as storage:
        _train(storage, [writer], range(50), period=10)
    dinoengine_logger.warning("between")
    writer.close()

    log = (tmp_path / "log.txt").read_text()
    assert "%|" not in log
    assert "\r" not in log
    lines = [line for line in stdout.getvalue().split("\n") if "iter " in line or "between" in line]
    assert len(lines) == 6
    for line in lines:  # what stands on the terminal's line in the end: the text after the last carriage return
        visible = re.sub(r"\x1b\[\d+m", "", line.rpartition("\r")[2])
        assert visible.startswith("[")
        assert "%|" not in visible
    assert ("50/50" in stdout.getvalue().rpartition("between")[2]) == terminal
    assert ("%|" in stdout.getvalue()) == terminal


def test_no_bar_unless_asked_for(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    writer = ConsoleWriter(50)
    with EventStorage(0) as storage:
        _train(storage, [writer], range(50), period=10)
    writer.close()
    assert stdout.getvalue() == ""
    assert len(logged) == 5


def test_peak_memory_is_in_mib_and_never_falls() -> None:
    before = peak_memory_mib()
    assert 20 < before < 2**20  # a Python with torch: more than 20 MiB, less than 1 TiB
    block = np.ones(2**27, np.uint8)  # 128 MiB
    assert peak_memory_mib() >= before
    del block
    assert peak_memory_mib() >= before


# ------------------------------------------------------------------------------------------------ TensorBoard


def _events(folder: Path) -> list[Any]:
    """The events of the one file in ``folder``: records of (length u64, crc u32, data, crc u32)."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data, offset, events = path.read_bytes(), 0, []
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        events.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
        offset += 12 + length + 4
    return events


def test_no_tensorboard_file_before_the_first_write(tmp_path: Path) -> None:
    writer = TensorboardXWriter(str(tmp_path / "tb"))
    with EventStorage(0) as storage:
        storage.put_scalar("a", 1.0)
    writer.close()
    assert not (tmp_path / "tb").exists()


def test_scalars_images_and_histograms_reach_tensorboard_once(tmp_path: Path) -> None:
    writer = TensorboardXWriter(str(tmp_path / "tb"))
    values = torch.tensor([[0.0, 1.0], [2.0, 10.0]])
    with EventStorage(0) as storage:
        for i in range(6):
            storage.iter = i
            storage.put_scalar("loss", i / 2)
            if i == 2:
                storage.put_image("crops", np.zeros((4, 6, 3), np.uint8))
                storage.put_image("mask", np.zeros((3, 5), np.uint8))
                storage.put_histogram("gradient", values, bins=5)
            if i % 2:
                writer.write()
        storage.put_scalar("late", 1.0, cur_iter=1)
        writer.write()
    writer.close()

    entries = [(event.step, value) for event in _events(tmp_path / "tb") for value in event.summary.value]
    scalars = [(v.tag, step, v.simple_value) for step, v in entries if v.WhichOneof("value") == "simple_value"]
    assert scalars == [*(("loss", i, i / 2) for i in range(6)), ("late", 1, 1.0)]
    images = {v.tag: (step, v.image.height, v.image.width) for step, v in entries if v.WhichOneof("value") == "image"}
    assert images == {"crops": (2, 4, 6), "mask": (2, 3, 5)}
    ((step, histogram),) = [(s, v.histo) for s, v in entries if v.WhichOneof("value") == "histo"]
    assert (step, histogram.num, histogram.min, histogram.max) == (2, 4, 0.0, 10.0)
    assert list(histogram.bucket) == [2, 1, 0, 0, 1]
    assert list(histogram.bucket_limit) == pytest.approx([2, 4, 6, 8, 10])
    assert histogram.sum == pytest.approx(1 + 1 + 3 + 9)  # from the middles of the bins


def test_several_writers_see_the_same(tmp_path: Path) -> None:
    writers = [TensorboardXWriter(str(tmp_path / "a")), TensorboardXWriter(str(tmp_path / "b"))]
    with EventStorage(0) as storage:
        storage.put_image("crops", np.zeros((2, 2, 3), np.uint8))
        _train(storage, writers, range(3), period=2)  # type: ignore[arg-type]
    for writer in writers:
        writer.close()
    tags = [[v.tag for e in _events(tmp_path / name) for v in e.summary.value] for name in "ab"]
    assert tags[0] == tags[1]
    assert sorted(tags[0]) == ["crops", "loss", "loss", "loss"]


def test_a_writer_is_an_event_writer_and_must_write() -> None:
    for kind in (JSONWriter, ConsoleWriter, TensorboardXWriter):
        assert issubclass(kind, EventWriter)
    with pytest.raises(TypeError, match="abstract"):
        EventWriter()  # type: ignore[abstract]


# ------------------------------------------------------------------------------------------------ disks that fail


@contextmanager
def _largest_file(num_bytes: int) -> Iterator[None]:
    """A disk that is full from this size on: a write is cut short, the next one is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_no_row_and_leaves_no_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage(0) as storage:
        _train(storage, [writer], range(2), period=2)
        good = path.read_bytes()
        storage.iter = 2
        storage.put_scalar("loss", 1.0, role="loss")
        with _largest_file(len(good) + 5), pytest.raises(OSError, match="File too large"):
            writer.write()
        assert path.read_bytes() == good
        storage.iter = 3
        storage.put_scalar("loss", 1.5, role="loss")
        writer.write()
    assert _rows(path) == [{"iteration": i, "loss": i / 2} for i in range(4)]


def test_rows_wait_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoengine.utils.writers.MAX_UNWRITTEN_ROWS", 3)
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        with _largest_file(5):
            for i in range(5):
                storage.iter = i
                storage.put_scalar("loss", i / 2)
                with pytest.raises(OSError, match="File too large"):
                    writer.write()
        writer.write()
    assert [row["iteration"] for row in _rows(tmp_path / "metrics.json")] == [2, 3, 4]


def test_a_folder_that_is_gone_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writers = [JSONWriter(str(folder / "metrics.json")), TensorboardXWriter(str(folder))]
    with EventStorage(0) as storage:
        _train(storage, writers, range(2), period=2)
        shutil.rmtree(folder)
        storage.iter = 2
        storage.put_scalar("loss", 1.0, role="loss")
        for writer in writers:
            writer.write()
            writer.close()
    assert _rows(folder / "metrics.json") == [{"iteration": 2, "loss": 1.0}]
    assert sum(p.stat().st_size for p in folder.glob("events*")) > 0


def test_tensorboard_waits_for_a_full_disk_with_its_values(tmp_path: Path) -> None:
    """Its library would write from a thread, which ends at the first error, and wait for that thread for ever."""
    writer = TensorboardXWriter(str(tmp_path))
    with EventStorage(0) as storage:
        storage.put_scalar("early", 1.0)
        with _largest_file(1000), pytest.raises(OSError, match="File too large"):
            writer.write()
        storage.put_scalar("late", 2.0)
        writer.write()
        writer.close()
    content = next(tmp_path.glob("events*")).read_bytes()
    assert b"early" in content
    assert b"late" in content


def test_a_line_after_a_pause_or_an_error_is_of_the_last_iteration_that_was_done(logged: list[str]) -> None:
    writer = ConsoleWriter(50)
    with EventStorage(0) as storage:
        _train(storage, [writer], range(30), period=20)
        storage.iter = 30  # as a trainer leaves it
        writer.write()
        writer.write()
    assert [line.split("  ")[0] for line in logged] == ["iter 20/50", "iter 30/50"]


def test_nan_is_no_news_to_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with EventStorage(0) as storage:
        storage.put_scalar("loss", float("nan"))
        writer = TensorboardXWriter(str(tmp_path))
        writer.write()
        writer.close()
    assert "NaN" not in caplog.text
