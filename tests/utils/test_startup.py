"""Parts of a start add up, and the age of a process is that of the process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinoengine.utils import startup
from dinoengine.utils.startup import StartupTimes, process_age

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that ``perf_counter`` gives, as its only element."""
    now = [100.0]
    monkeypatch.setattr(startup.time, "perf_counter", lambda: now[0])
    return now


def test_parts_follow_each_other_and_leave_nothing_out(clock: list[float]) -> None:
    times = StartupTimes()
    for name, moment in (("data", 101.0), ("model", 101.5), ("data", 103.5), ("step", 106.5)):
        clock[0] = moment
        times.mark(name)
    assert times.seconds == {"data": 3.0, "model": 0.5, "step": 3.0}
    times.split_off("step", "batch", 2.0)
    times.put_first({"imports": 4.0})
    assert list(times.seconds.items()) == [
        ("imports", 4.0),
        ("data", 3.0),
        ("model", 0.5),
        ("batch", 2.0),
        ("step", 1.0),
    ]
    assert times.line() == "10.5 s: imports 4.0, data 3.0, model 0.5, batch 2.0, step 1.0"


def test_the_age_of_a_process_lies_between_what_it_and_its_parent_saw() -> None:
    code = """
import time
began = time.monotonic()
from dinoengine.utils.startup import process_age
time.sleep(0.2)
age = process_age()
print(age, time.monotonic() - began)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    age, at_least = map(float, done.stdout.split())
    tick = 0.01  # of the kernel's record
    assert at_least - tick <= age <= time.monotonic() - began + tick


def test_without_proc_the_age_counts_from_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, **options: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr(startup, "_FIRST_SEEN", time.monotonic() - 50)
    assert 50 <= process_age() < 60
