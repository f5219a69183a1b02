"""Logging: one logger named "dinoengine", coloured on a terminal, plain in OUTPUT_DIR/log.txt."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, deque
from typing import Any

from tabulate import tabulate
from termcolor import colored

from dinoengine.utils.console import discard_stdout
from dinoengine.utils.file_writing import append_whole
from dinoengine.utils.printable import printable_lines

ROOT_NAME = "dinoengine"
_PLAIN = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_DATE = "%m/%d %H:%M:%S"
_LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class _ColourFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time_and_name = colored(f"[{self.formatTime(record, _DATE)} {short_name(record.name)}]", "green")
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        text = printable_lines(text)
        colour = _LEVEL_COLOURS.get(record.levelname)
        level = f"{colored(record.levelname, colour, attrs=['bold'])} " if colour else ""
        return f"{time_and_name}: {level}{text}"


class _PlainFormatter(logging.Formatter):
    """A line for a file. Names in a message must not move the cursor of a terminal that shows it, in either formatter."""

    def __init__(self) -> None:
        super().__init__(_PLAIN, _DATE)

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _StdoutHandler(logging.StreamHandler):
    """Writes above a progress bar if one is shown, and to whatever sys.stdout is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            with tqdm.external_write_mode(file=sys.stdout):
                encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
                # A file name need not be text that this terminal, or any, can show.
                text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
                print(text, file=sys.stdout, flush=True)
        except BrokenPipeError:
            discard_stdout()  # the work goes on, and log.txt with it
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """log.txt. A full disk or a removed folder ends nothing: lines wait, at most ``MAX_WAITING`` of them, and are written
    when that is possible again; the folder is made anew. Said once on standard error.

    Attributes:
        num_lost: lines that were dropped.
    """

    MAX_WAITING = 10_000

    def __init__(self, path: str) -> None:
        super().__init__(path, delay=True)
        self.num_lost = 0
        self._waiting: deque[bytes] = deque()
        self._is_failing = False
        self._append(b"")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.append(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:  # arguments that do not fit the message: as every handler does
            self.handleError(record)
            return
        if len(self._waiting) > self.MAX_WAITING:
            self._waiting.popleft()
            self.num_lost += 1
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            if not self._is_failing:
                print(f"{self.baseFilename} cannot be written, and lines wait: {error}", file=sys.stderr)
            self._is_failing = True
            return
        self._waiting.clear()
        self._is_failing = False

    def _append(self, data: bytes) -> None:
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        append_whole(self.baseFilename, data)

    def close(self) -> None:
        if self._waiting or self.num_lost:
            num = len(self._waiting) + self.num_lost
            print(f"{num} lines are missing in {self.baseFilename}; it could not be written.", file=sys.stderr)
            self._waiting.clear()
            self.num_lost = 0
        super().close()


def short_name(name: str) -> str:
    """``dinoengine.engine.hooks.timing`` -> ``engine``: what a reader of the console needs."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == ROOT_NAME else name


def setup_logger(output_dir: str | None = None, distributed_rank: int = 0, name: str = ROOT_NAME) -> logging.Logger:
    """Configure the logger that every dinoengine module propagates to. Calling it again changes, never doubles.

    Args:
        output_dir: folder of log.txt (log.txt.rankN for N > 0); None: no file.
        distributed_rank: only rank 0 writes to standard output.
        name: another top-level logger (of your own package) to set up in the same way.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    if distributed_rank == 0 and not any(isinstance(h, _StdoutHandler) for h in logger.handlers):
        handler = _StdoutHandler()
        handler.setLevel(logging.INFO)
        is_terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()
        handler.setFormatter(_ColourFormatter() if is_terminal else _PlainFormatter())
        logger.addHandler(handler)
    if output_dir is not None:
        path = os.path.join(output_dir, "log.txt" if distributed_rank == 0 else f"log.txt.rank{distributed_rank}")
        path = os.path.abspath(path)
        for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
            if old.baseFilename == path:
                return logger
            logger.removeHandler(old)
            old.close()
        file_handler = LogFile(path)
        file_handler.setFormatter(_PlainFormatter())
        logger.addHandler(file_handler)
    return logger


_counts: Counter[Any] = Counter()
_last_times: dict[Any, float] = {}


def log_first_n(level: int, message: str, n: int = 1, *, name: str = ROOT_NAME) -> None:
    """Log ``message`` only the first ``n`` times it occurs."""
    _counts[name, message] += 1
    if _counts[name, message] <= n:
        logging.getLogger(name).log(level, message)


def log_every_n(level: int, message: str, n: int, *, name: str = ROOT_NAME) -> None:
    """Log the 1st, (n+1)th, (2n+1)th ... occurrence of ``message``."""
    _counts[name, message] += 1
    if (_counts[name, message] - 1) % n == 0:
        logging.getLogger(name).log(level, message)


def log_every_n_seconds(
    level: int, message: str, seconds: float, *, name: str = ROOT_NAME, key: str | None = None
) -> None:
    """Log ``message`` unless one with the same ``key`` (default: the message) was logged less than ``seconds`` ago."""
    now = time.monotonic()
    key = message if key is None else key
    if now - _last_times.get((name, key), float("-inf")) >= seconds:
        _last_times[name, key] = now
        logging.getLogger(name).log(level, message)


def create_small_table(values: dict[str, Any]) -> str:
    """A one-row table with the keys as header."""
    return tabulate([list(values.values())], headers=list(values), tablefmt="pipe", floatfmt=".3f", numalign="center")
