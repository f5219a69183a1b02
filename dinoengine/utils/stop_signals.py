"""The signals that ask a process to end, and how it ends before there is anything to save.

Imports nothing heavy: a command calls ``end_when_asked`` first of all, before torch, whose import takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

# What a run may be asked to end by. SIGUSR1 is what SLURM's --signal is commonly set to; Windows has no such signal.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

# Of a run that was saved and ended before its last iteration: start it again with --resume. (EX_TEMPFAIL of sysexits.h)
EXIT_PAUSED = 75


def end_when_asked() -> None:
    """Until a training takes over, a signal ends the process with the code of a pause: there is nothing to save.

    Without it SIGUSR1 would end a process that is still importing with 138, which no queue takes for a pause. In a thread
    other than the main one it does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Not through logging: a handler may run while the log's own lock or buffer is in use.
    with contextlib.suppress(OSError):
        os.write(2, f"\nreceived {signal.Signals(number).name} outside of training: nothing to save.\n".encode())
    raise SystemExit(EXIT_PAUSED)
