"""Errors of the user, and bugs."""

from __future__ import annotations

import re
import time

import pytest

from dinoengine.config import ConfigError
from dinoengine.data import DataError
from dinoengine.engine.user_errors import exit_on_user_error


@pytest.mark.parametrize("error", [ValueError("a"), KeyError("a"), FileNotFoundError("a"), ConfigError("x", ["a"])])
def test_a_user_error_is_one_line_and_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done, exit_on_user_error():
        raise error
    assert done.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_another_rank_tells_its_name_after_rank_0_had_its_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit), exit_on_user_error():
        raise ValueError("no images")
    assert re.fullmatch(r"error on rank 1 \(.+\): no images\n", capsys.readouterr().err)
    assert waited == [3]


def test_only_the_named_errors_are_the_users() -> None:
    with pytest.raises(ValueError, match="a bug"), exit_on_user_error(DataError):
        raise ValueError("a bug")
    with pytest.raises(SystemExit), exit_on_user_error(DataError):
        raise DataError("a file")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError, match="bug"), exit_on_user_error():
        raise AssertionError("bug")
