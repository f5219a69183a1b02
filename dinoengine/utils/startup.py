"""Where the time between the start of a process and the first iteration goes."""

from __future__ import annotations

import os
import time

_FIRST_SEEN = time.monotonic()


def process_age() -> float:
    """Seconds since this process was started, to a hundredth; without /proc (not Linux) since this module was imported."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()  # behind the name, which may hold spaces
    except OSError:
        return time.monotonic() - _FIRST_SEEN
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # "starttime" of proc(5): clock ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class StartupTimes:
    """Seconds of the consecutive parts of a start, by name; begins when it is made.

    Attributes:
        seconds: of each part so far, in order. Their sum is all the time that went by.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def put_first(self, earlier: dict[str, float]) -> None:
        """Parts that were over before this object was made."""
        self.seconds = {**earlier, **self.seconds}

    def mark(self, name: str) -> None:
        """End a part: all time since the one before it."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def split_off(self, name: str, part: str, seconds: float) -> None:
        """Show ``seconds`` of the last part ``name`` as a part of its own before it."""
        rest = self.seconds.pop(name) - seconds
        self.seconds |= {part: seconds, name: rest}

    def line(self) -> str:
        """Like "6.1 s: imports 3.2, model 0.4, ..."."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"
