"""The position table at other sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoengine.modeling.layers.position import interpolate_position_table


def _table(rows: int, columns: int, dim: int = 3) -> Tensor:
    return torch.randn(1, 1 + rows * columns, dim, generator=torch.Generator().manual_seed(0))


def test_the_same_grid_is_the_table_itself() -> None:
    table = _table(3, 4)
    assert interpolate_position_table(table, (3, 4), (3, 4), antialias=False, offset=0.1) is table


def test_a_transposed_grid_is_not_the_same_grid() -> None:
    table = _table(3, 4)
    out = interpolate_position_table(table, (3, 4), (4, 3), antialias=False, offset=0.0)
    assert not torch.equal(out, table)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("table_grid", "grid"), [((37, 37), (16, 16)), ((4, 6), (7, 5)), ((5, 5), (1, 3))])
def test_equals_torch_called_directly(
    table_grid: tuple[int, int], grid: tuple[int, int], offset: float, antialias: bool
) -> None:
    table = _table(*table_grid)
    image = table[:, 1:].reshape(1, *table_grid, 3).permute(0, 3, 1, 2)
    if offset:
        scale = ((grid[0] + 0.1) / table_grid[0], (grid[1] + 0.1) / table_grid[1])
        expected = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        expected = F.interpolate(image, size=grid, mode="bicubic", antialias=antialias)
    got = interpolate_position_table(table, table_grid, grid, antialias=antialias, offset=offset)
    torch.testing.assert_close(got[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(got[:, :1], table[:, :1])


def test_the_offset_and_antialiasing_matter() -> None:
    table = _table(37, 37)
    plain = interpolate_position_table(table, (37, 37), (16, 16), antialias=False, offset=0.0)
    shifted = interpolate_position_table(table, (37, 37), (16, 16), antialias=False, offset=0.1)
    smooth = interpolate_position_table(table, (37, 37), (16, 16), antialias=True, offset=0.0)
    assert (plain - shifted).norm() / plain.norm() > 0.1
    assert (plain - smooth).norm() / plain.norm() > 0.5


def test_geometry_on_a_coordinate_grid() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    table = torch.cat((torch.full((1, 1, 2), 99.0), torch.stack((rows, columns), -1).reshape(1, 48, 2)), 1)
    out = interpolate_position_table(table, (8, 6), (16, 12), antialias=False, offset=0.0)
    got = out[0, 1:].reshape(16, 12, 2)
    expected_rows = (torch.arange(16) + 0.5) / 2 - 0.5
    torch.testing.assert_close(got[4:12, 6, 0], expected_rows[4:12], atol=0.06, rtol=0)  # bicubic is not quite linear
    assert torch.equal(out[0, 0], torch.full((2,), 99.0))
    assert (got[:, 0, 1] < got[:, -1, 1]).all()


@pytest.mark.parametrize("size", [546, 602, 1092, 14, 532])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_sizes_that_rounding_could_spoil(size: int, offset: float) -> None:
    grid = (size // 14, size // 14)
    out = interpolate_position_table(_table(37, 37), (37, 37), grid, antialias=False, offset=offset)
    assert out.shape == (1, 1 + grid[0] ** 2, 3)


def test_interpolation_is_in_fp32_and_the_result_in_the_tables_dtype() -> None:
    table = _table(4, 4)
    got = interpolate_position_table(table.bfloat16(), (4, 4), (6, 6), antialias=False, offset=0.0)
    exact = interpolate_position_table(table.bfloat16().float(), (4, 4), (6, 6), antialias=False, offset=0.0)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.bfloat16())


def _cubic(distance: float, a: float) -> float:
    """Keys' convolution kernel; a = -0.75 in torch's plain bicubic, -0.5 in the antialiased one."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _plain_taps(target: int, scale: float, size: int) -> list[tuple[int, float]]:
    """(source index, weight) of one target index: four neighbours, those outside the table moved to its edge."""
    source = (target + 0.5) / scale - 0.5
    left = math.floor(source)
    return [(min(max(k, 0), size - 1), _cubic(source - k, -0.75)) for k in range(left - 1, left + 3)]


def _antialiased_taps(target: int, scale: float, size: int) -> list[tuple[int, float]]:
    """The kernel widened by the reduction, cut at the edges and normalised."""
    width = max(1.0, 1.0 / scale)
    centre = (target + 0.5) / scale
    near = [k for k in range(size) if abs(k + 0.5 - centre) < 2 * width]
    weights = [_cubic((k + 0.5 - centre) / width, -0.5) for k in near]
    return [(k, w / sum(weights)) for k, w in zip(near, weights, strict=True)]


@pytest.mark.parametrize(("antialias", "offset"), [(False, 0.1), (False, 0.0), (True, 0.0)])
@pytest.mark.parametrize(("table_grid", "grid"), [((37, 37), (16, 16)), ((5, 5), (5, 7)), ((4, 6), (9, 3))])
def test_equals_a_bicubic_written_out(
    table_grid: tuple[int, int], grid: tuple[int, int], antialias: bool, offset: float
) -> None:
    """The published models: (False, 0.1) without registers, (True, 0) with.

    With an offset the scale is (size + 0.1) / table, not size / table: that is what moves the sampling points.
    """
    table = _table(*table_grid).double()
    image = table[0, 1:].reshape(*table_grid, 3)
    taps = _antialiased_taps if antialias else _plain_taps
    scales = [(size + offset) / old for size, old in zip(grid, table_grid, strict=True)]
    expected = torch.zeros(*grid, 3, dtype=torch.float64)
    for r in range(grid[0]):
        for c in range(grid[1]):
            for row, row_weight in taps(r, scales[0], table_grid[0]):
                for column, column_weight in taps(c, scales[1], table_grid[1]):
                    expected[r, c] += row_weight * column_weight * image[row, column]
    got = interpolate_position_table(table.float(), table_grid, grid, antialias=antialias, offset=offset)
    torch.testing.assert_close(got[0, 1:].double(), expected.flatten(0, 1), rtol=0, atol=2e-5)
    assert torch.equal(got[:, :1], table[:, :1].float())
