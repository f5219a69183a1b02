"""What a check says of a package in which something was broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dinoengine.evaluation.numerics.quantity import Quantity


def failures(check: Callable[[], Iterable[Quantity]]) -> list[str]:
    """Names of the quantities that fail."""
    return [q.name for q in check() if q.verdict == "FAIL"]
