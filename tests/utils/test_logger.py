from __future__ import annotations

import functools
import io
import logging
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import termcolor

from dinoengine.utils.logger import (
    ROOT_NAME,
    LogFile,
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
    short_name,
)


@pytest.fixture
def name() -> Iterator[str]:
    """A top-level logger of its own."""
    name = f"test_{uuid.uuid4().hex}"
    yield name
    for handler in logging.getLogger(name).handlers:
        handler.close()


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The dinoengine logger without handlers, restored afterwards."""
    logger = logging.getLogger(ROOT_NAME)
    saved = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers.clear()
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = saved


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_per_message_however_often_it_is_set_up(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logger(name=name)
    for _ in range(3):
        setup_logger(str(tmp_path), name=name)
    logging.getLogger(name).info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "log.txt").read_text().count("hello") == 1


def test_the_same_folder_written_in_another_way_is_the_same_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path), ".", f"{tmp_path}/x/.."):
        (tmp_path / "x").mkdir(exist_ok=True)
        setup_logger(folder, name=name)
    logging.getLogger(name).info("hello")
    assert (tmp_path / "log.txt").read_text().count("hello") == 1


def test_a_new_folder_replaces_the_old_one(name: str, tmp_path: Path) -> None:
    setup_logger(str(tmp_path / "a"), name=name).info("first")
    setup_logger(str(tmp_path / "b" / "c"), name=name).info("second")
    assert "second" not in (tmp_path / "a" / "log.txt").read_text()
    assert "first" not in (tmp_path / "b" / "c" / "log.txt").read_text()
    assert "second" in (tmp_path / "b" / "c" / "log.txt").read_text()


def test_a_restart_appends(name: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("from before\n")
    setup_logger(str(tmp_path), name=name).info("after")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == "from before"
    assert lines[1].endswith("after")


def test_other_ranks_write_their_own_file_and_nothing_on_standard_output(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logger(str(tmp_path), distributed_rank=3, name=name).warning("from rank 3")
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt.rank3"]
    assert "from rank 3" in (tmp_path / "log.txt.rank3").read_text()


def test_the_format_in_the_file(name: str, tmp_path: Path) -> None:
    setup_logger(str(tmp_path), name=name).warning("look out %d", 3)
    line = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(rf"\[\d\d/\d\d \d\d:\d\d:\d\d\] {name} WARNING: look out 3\n", line)


def test_debug_goes_to_the_file_only(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(str(tmp_path), name=name).debug("details")
    assert "details" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out == ""


def test_sub_packages_propagate_and_nothing_leaks_to_the_root_logger(
    root: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = io.StringIO()
    handler = logging.StreamHandler(outer)
    logging.getLogger().addHandler(handler)
    try:
        setup_logger(str(tmp_path))
        logging.getLogger("dinoengine.engine.hooks.timing").info("deep")
        logging.getLogger("dinoengine_lookalike").info("not ours")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out.count("deep") == 1
    text = (tmp_path / "log.txt").read_text()
    assert text.count("deep") == 1
    assert "not ours" not in text
    assert "deep" not in outer.getvalue()


def test_colour_on_a_terminal_only_never_in_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # termcolor looks at the real terminal, and remembers what it saw
    monkeypatch.setattr("dinoengine.utils.logger.colored", functools.partial(termcolor.colored, force_color=True))
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    logger = setup_logger(str(tmp_path), name=name)
    logger.info("plain")
    logger.error("red")
    try:
        raise ValueError("the reason")
    except ValueError:
        logger.exception("failed")
    shown = stdout.getvalue()
    assert "\x1b[32m" in shown
    assert re.search(r"\x1b\[31mERROR", shown)
    assert "ValueError: the reason" in shown
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


def test_no_colour_when_output_is_piped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoengine.utils.logger.colored", functools.partial(termcolor.colored, force_color=True))
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    setup_logger(name=name).error("red")
    assert "\x1b" not in stdout.getvalue()


def test_standard_output_may_be_exchanged_after_the_set_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = setup_logger(name=name)
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    logger.info("to the new one")
    assert "to the new one" in stdout.getvalue()


def test_short_names() -> None:
    assert short_name("dinoengine.engine.hooks.timing") == "engine"
    assert short_name("dinoengine") == "dinoengine"
    assert short_name("fvcore.common") == "fvcore.common"


@pytest.fixture
def records(name: str) -> list[str]:
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(f"{record.levelname} {record.getMessage()}")

    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Keep())
    return seen


def test_log_first_n_counts_each_message(name: str, records: list[str]) -> None:
    for _ in range(5):
        log_first_n(logging.WARNING, "a", 2, name=name)
        log_first_n(logging.INFO, "b", name=name)
    assert sorted(records) == ["INFO b", "WARNING a", "WARNING a"]


def test_log_every_n_logs_the_first_and_then_every_nth(name: str, records: list[str]) -> None:
    logged = []
    for i in range(7):
        log_every_n(logging.INFO, "a", 3, name=name)
        logged.append((i, len(records)))
    assert logged == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3)]


def test_log_every_n_seconds(name: str, records: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dinoengine.utils.logger.time.monotonic", lambda: now[0])
    for seconds, expected in [(0, 1), (4.9, 1), (5, 2), (5.1, 2), (9.9, 2), (10, 3)]:
        now[0] = 100.0 + seconds
        log_every_n_seconds(logging.INFO, "a", 5, name=name)
        assert len(records) == expected, seconds
    log_every_n_seconds(logging.INFO, "b", 5, name=name)
    assert records[-1] == "INFO b"


def test_small_table() -> None:
    header, rule, row = create_small_table({"top1": 91.23456, "images": 12}).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["top1", "images"]
    assert set(rule) <= set("|:-")
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["91.235", "12"]


def test_lines_wait_for_a_folder_that_is_in_the_way_and_for_a_disk_that_is_full(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    logger = setup_logger(str(folder), name=name)
    logger.info("one")
    shutil.rmtree(folder)
    logger.info("two")
    assert (folder / "log.txt").read_text().endswith("two\n")
    shutil.rmtree(folder)
    folder.write_text("a file where the folder should be")
    for i in range(3):
        logger.info("three %d", i)
    folder.unlink()
    folder.mkdir()
    (folder / "log.txt").symlink_to("/dev/full")
    logger.info("four")
    (folder / "log.txt").unlink()
    logger.info("five")
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line.split(": ")[-1] for line in lines] == ["three 0", "three 1", "three 2", "four", "five"]
    errors = capsys.readouterr().err
    assert errors.count("cannot be written, and lines wait") == 1
    assert "Traceback" not in errors


def test_lines_that_never_reach_the_file_are_counted_at_the_end(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogFile, "MAX_WAITING", 2)
    handler = LogFile(str(tmp_path / "log.txt"))
    (tmp_path / "log.txt").unlink()
    (tmp_path / "log.txt").symlink_to("/dev/full")
    for i in range(5):
        handler.emit(logging.LogRecord(name, logging.INFO, "", 0, "line %d", (i,), None))
    assert handler.num_lost == 3
    handler.close()
    assert "5 lines are missing" in capsys.readouterr().err


def test_control_characters_in_a_message_reach_neither_terminal_nor_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", terminal)
        setup_logger(str(tmp_path), name=f"{name}{terminal.isatty()}").warning("%s\nis bad", "a\x1b[2J.png")
        shown = terminal.getvalue()
        assert "a\\x1b[2J.png\nis bad" in shown
        assert "\x1b[2J" not in shown
    assert "\x1b" not in (tmp_path / "log.txt").read_text()
