"""Commands whose output nobody reads to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinoengine.utils.console import run_tool

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINING = {"train_net.py", "plain_train_net.py"}
RUN = "from dinoengine.utils.console import run_tool"
LOG = "from dinoengine.utils.logger import setup_logger; import sys; log = setup_logger()"


def _without_reader(*words: str) -> subprocess.CompletedProcess[str]:
    """Python with a standard output whose other end is closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=write_end, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write_end)


@pytest.mark.parametrize(
    "command",
    ["lambda: print('few')", "lambda: print('x' * 100_000)", "lambda: [print('help'), exit(0)]"],
    ids=["buffered", "while printing", "--help"],
)
def test_a_tool_without_a_reader_ends_quietly(command: str) -> None:
    done = _without_reader("-c", f"{RUN}; run_tool({command})")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_real_tool_is_not_answered_with_an_error_of_the_users() -> None:
    done = _without_reader("tools/show_config.py")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_log_without_a_reader_does_not_stop_the_work() -> None:
    done = _without_reader("-c", f"{LOG}; log.info('one'); log.warning('two'); print('done', file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "done\n")


@pytest.mark.parametrize(("result", "code"), [(None, None), (0, 0), (1, 1)])
def test_the_exit_code_is_that_of_the_command(result: int | None, code: int | None) -> None:
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: result)
    assert ended.value.code == code


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)


def test_every_tool_that_prints_ends_this_way() -> None:
    tools = {path.name for path in (ROOT / "tools").glob("*.py")}
    ending = {name for name in tools if (ROOT / "tools" / name).read_text().endswith("    run_tool(main)\n")}
    assert ending == tools - TRAINING
