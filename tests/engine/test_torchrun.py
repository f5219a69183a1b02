"""The environment of torchrun, whole, in part and wrong."""

from __future__ import annotations

import pytest

from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.config_loading import load_config
from dinoengine.engine.torchrun import process_rank, require_whole_environment, under_torchrun

WHOLE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_whole_environment_says_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, WHOLE)
    require_whole_environment()
    assert under_torchrun()
    assert process_rank() == 3


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "node7"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}])
def test_what_does_not_speak_of_several_processes_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    _set(monkeypatch, variables)
    require_whole_environment()
    assert not under_torchrun()
    assert process_rank() == 0


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"])
def test_a_part_of_it_would_train_alone(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    _set(monkeypatch, {name: value for name, value in WHOLE.items() if name != missing})
    with pytest.raises(ValueError, match=f"as torchrun sets it, but not {missing}: each process would run alone"):
        load_config(default_argument_parser().parse_args([]))


def test_a_rank_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {**WHOLE, "RANK": "x"})
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        load_config(default_argument_parser().parse_args([]))
    assert process_rank() == 0  # whose message it is
