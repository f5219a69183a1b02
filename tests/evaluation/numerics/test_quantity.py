from __future__ import annotations

import math

import pytest

from dinoengine.evaluation.numerics.quantity import Quantity, largest, quantities_table


@pytest.mark.parametrize(
    ("got", "tolerance", "verdict"),
    [
        (10, 0.0, "ok"),
        (11, 0.0, "FAIL"),
        (10.5, 0.5, "ok"),
        (9.4, 0.5, "FAIL"),
        (math.nan, 1e9, "FAIL"),
        (math.inf, 1e9, "FAIL"),
        (None, 1e9, "FAIL"),
    ],
)
def test_verdicts(got: float | None, tolerance: float, verdict: str) -> None:
    assert Quantity("q", "s", 10, got, tolerance).verdict == verdict


@pytest.mark.parametrize("values", [[math.nan, 0.0], [0.0, math.nan], [0.0, math.nan, math.inf]])
def test_the_largest_of_values_with_a_nan_is_nan(values: list[float]) -> None:
    assert math.isnan(largest(values))


def test_the_largest_of_numbers_is_the_largest() -> None:
    assert largest(iter([0.5, 3.0, 2.0])) == 3.0
    assert largest([1.0, math.inf]) == math.inf
    with pytest.raises(ValueError, match="empty"):
        largest([])


def test_what_is_not_installed_does_not_fail() -> None:
    quantity = Quantity("q", "s", 0.0, None, note="timm is not installed", skipped=True)
    assert quantity.verdict == "not installed"
    assert "timm is not installed" in quantities_table([quantity])


def test_the_table_shows_every_column() -> None:
    table = quantities_table([Quantity("parameters", "a file", 22_056_576, 22_056_577), Quantity("LR", "", 1e-7, None)])
    first, second = table.splitlines()[2:]
    assert first.split() == ["parameters", "22,056,576", "22,056,577", "0", "FAIL", "a", "file"]
    assert second.split() == ["LR", "1e-07", "0", "FAIL"]
