from __future__ import annotations

from collections.abc import Iterator

import pytest

from dinoengine.evaluation.numerics import checks
from dinoengine.evaluation.numerics.quantity import Quantity


def _fine() -> Iterator[Quantity]:
    yield Quantity("fine", "", 1.0, 1.0)


def _half() -> Iterator[Quantity]:
    yield Quantity("first", "", 1.0, 1.0)
    raise KeyError("no such parameter")


def test_checks_run_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"half": _half, "fine": _fine})
    assert [q.name for q in checks.run_checks(["fine"])] == ["fine"]
    assert [q.name for q in checks.run_checks()] == ["first", "check half", "fine"]


def test_a_check_that_raises_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"half": _half, "fine": _fine})
    first, broken, fine = checks.run_checks(["half", "fine"])
    assert (broken.name, broken.verdict, broken.note) == ("check half", "FAIL", "KeyError: 'no such parameter'")
    assert first.verdict == fine.verdict == "ok"


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(ValueError, match="There is no check size, koala; there are sizes, schedules,"):
        checks.run_checks(["size", "targets", "koala"])
