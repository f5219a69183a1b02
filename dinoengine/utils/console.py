"""Standard output whose reader has gone, as in ``python tools/show_config.py | head``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run the command of a tool and exit with its code; quietly with 141 once nobody reads what it prints.

    For commands that print. A training logs, and goes on without a reader (``utils.logger``); here, a BrokenPipeError of
    its data workers would be hidden.
    """
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()  # here, where the error can be caught, and not when the interpreter ends
    except BrokenPipeError:
        discard_stdout()
        code = _BROKEN_PIPE
    sys.exit(code)


def discard_stdout() -> None:
    """What is written to standard output from now on, and what is still buffered, goes nowhere, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
