"""One figure, expected and measured, and the table of many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A figure with its source.

    Attributes:
        name: what is measured, with its unit where it has one.
        source: where the expected figure comes from: a published file, a recipe, a formula or a plain loop.
        expected: the figure; 0 for a difference.
        got: what this installation computes; None if that was not possible.
        tolerance: largest allowed distance between the two, absolute.
        note: why ``got`` is None.
        skipped: True where a package that the comparison needs is not installed; that is no failure.
    """

    name: str
    source: str
    expected: float
    got: float | None
    tolerance: float = 0.0
    note: str = ""
    skipped: bool = False

    @property
    def verdict(self) -> str:
        """ "ok", "FAIL" (also for NaN) or "not installed"."""
        if self.skipped:
            return "not installed"
        return "ok" if self.got is not None and abs(self.got - self.expected) <= self.tolerance else "FAIL"


def largest(values: Iterable[float]) -> float:
    """The largest value, NaN if any is NaN: ``max`` keeps a number that comes before a NaN, which then looks right.

    Raises:
        ValueError: without values.
    """
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def quantities_table(quantities: Iterable[Quantity]) -> str:
    """Quantity, expected, got, tolerance, verdict and source, one row each."""
    from tabulate import tabulate

    rows = [
        (q.name, _written(q.expected), _written(q.got) or q.note, _written(q.tolerance), q.verdict, q.source)
        for q in quantities
    ]
    headers = ("quantity", "expected", "got", "tolerance", "verdict", "source")
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=("left", *["right"] * 3, "left"))


def _written(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.7g}"
