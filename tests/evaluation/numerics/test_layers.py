"""Each check of a layer fails where the layer is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinoengine.evaluation.numerics import layers
from dinoengine.modeling.layers.drop_path import KeptSamples
from tests.evaluation.numerics.failures import failures


@pytest.mark.parametrize(
    ("settings", "broken"),
    [({"offset": 0.0}, "offset 0.1 (released)"), ({"antialias": False}, "antialiased (released, reg4)")],
)
def test_an_ignored_setting_fails(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], broken: str) -> None:
    original = layers.interpolate_position_table
    monkeypatch.setattr(
        layers, "interpolate_position_table", lambda *args, **options: original(*args, **{**options, **settings})
    )
    failed = failures(layers.check_positions)
    assert [name.split(", ")[1] for name in failed if "difference" in name and broken in name]
    assert any("relative change" in name for name in failed)
    assert not any(name.startswith("positions, plain") for name in failed)


def test_rows_and_columns_that_change_places_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = layers.interpolate_position_table

    def transposed(table: Tensor, table_grid: tuple[int, int], grid: tuple[int, int], **options: Any) -> Tensor:
        return original(table, table_grid, grid[::-1], **options)

    monkeypatch.setattr(layers, "interpolate_position_table", transposed)
    failed = failures(layers.check_positions)
    assert len(failed) == 3
    assert all("39 x 28" in name for name in failed)


def _bernoulli(batch: int, drop_rate: float, device: torch.device) -> KeptSamples:
    """The textbook kind, whose number is a matter of chance, and which scales by 1 / (1 - rate)."""
    keep = torch.rand(batch, device=device) >= drop_rate
    return KeptSamples(keep.nonzero().flatten(), 1 / (1 - drop_rate))


def test_the_textbook_drop_path_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)  # in one of nine draws it keeps 44 of 64 as well
    monkeypatch.setattr(layers, "draw_kept", _bernoulli)
    failed = failures(layers.check_stochastic_depth)
    assert "samples kept of 64 at drop rate 0.3" in failed
    assert "factor of a kept branch, 64 at 0.3" in failed
