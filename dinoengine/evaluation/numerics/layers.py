"""Position interpolation against a bicubic written out, and stochastic depth against its counts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dinoengine.evaluation.numerics.quantity import Quantity
from dinoengine.modeling.layers.drop_path import add_kept, draw_kept, take_kept
from dinoengine.modeling.layers.position import interpolate_position_table

TABLE_GRID = (37, 37)  # 518 / 14, the released models'
SETTINGS = {"offset 0.1 (released)": (False, 0.1), "plain": (False, 0.0), "antialiased (released, reg4)": (True, 0.0)}


def check_positions() -> Iterator[Quantity]:
    """The three ways to resample a position table, and how far apart they are."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 1 + math.prod(TABLE_GRID), 8, generator=generator)
    image = table[0, 1:].double().reshape(*TABLE_GRID, -1)
    at_16 = {}
    for name, (antialias, offset) in SETTINGS.items():
        for grid in ((16, 16), (39, 28)):
            got = interpolate_position_table(table, TABLE_GRID, grid, antialias=antialias, offset=offset)
            rows, columns = (
                _resampling_matrix(old, new, antialias, offset) for old, new in zip(TABLE_GRID, grid, strict=True)
            )
            expected = torch.einsum("rR,cC,RCd->rcd", rows, columns, image).flatten(0, 1)
            difference = (got[0, 1:].double() - expected).abs().max().item()
            label = f"positions, {name}, 37 x 37 to {grid[0]} x {grid[1]}, difference"
            yield Quantity(label, "bicubic written out", 0.0, difference, 2e-5)
            if grid == (16, 16):
                at_16[name] = got[0, 1:]
    released, plain, smooth = at_16.values()
    for name, other, expected_share in (("offset 0.1", released, 0.29), ("antialiasing", smooth, 0.81)):
        share = ((other - plain).norm() / plain.norm()).item()
        label = f"positions, relative change by {name}, 37 to 16"
        yield Quantity(label, "published code on random tables", expected_share, share, 0.03)


def _resampling_matrix(old: int, new: int, antialias: bool, offset: float) -> Tensor:
    """[new, old] float64: what each target position takes from each source position."""
    scale = (new + offset) / old
    width = max(1.0, 1.0 / scale) if antialias else 1.0
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for target in range(new):
        source = (target + 0.5) / scale - 0.5
        # Outside the table: antialiasing leaves the taps out and normalises, plain bicubic repeats the edge.
        for tap in range(math.floor(source - 2 * width), math.ceil(source + 2 * width) + 1):
            weight = _cubic((tap - source) / width, -0.5 if antialias else -0.75)
            if not antialias or 0 <= tap < old:
                matrix[target, min(max(tap, 0), old - 1)] += weight
        matrix[target] /= matrix[target].sum()
    return matrix


def _cubic(x: float, a: float) -> float:
    """Keys' convolution kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def check_stochastic_depth() -> Iterator[Quantity]:
    """Samples that run and the factor of their branch: max(int(B (1 - rate)), 1) and B / kept."""
    source = "published code: max(int(B * (1 - rate)), 1)"
    for batch, rate, kept in ((64, 0.3, 44), (64, 0.4, 38), (12, 0.4, 7), (2, 0.4, 1), (1, 0.9, 1)):
        stream = torch.zeros(batch, 1, 1)
        with torch.random.fork_rng(devices=[]):
            drawn = draw_kept(batch, rate, stream.device)
        part = take_kept(stream, drawn)
        out = add_kept(stream, torch.ones_like(part), drawn)
        yield Quantity(f"samples kept of {batch} at drop rate {rate}", source, kept, len(part))
        yield Quantity(f"factor of a kept branch, {batch} at {rate}", source, batch / kept, out.max().item(), 1e-5)
