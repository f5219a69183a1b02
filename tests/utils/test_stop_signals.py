from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dinoengine.utils.stop_signals import EXIT_PAUSED, STOP_SIGNALS, end_when_asked

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_while_the_command_imports_is_a_pause(tmp_path: Path, name: str) -> None:
    """A torch that sends the signal as soon as it is imported, which is before anything else of the command."""
    (tmp_path / "torch.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\nprint('still here')\n")
    done = subprocess.run(
        [sys.executable, "tools/train_net.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_PAUSED == 75
    assert done.stderr == f"\nreceived {name} outside of training: nothing to save.\n"
    assert done.stdout == ""


def test_in_another_thread_nothing_changes() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=end_when_asked)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
