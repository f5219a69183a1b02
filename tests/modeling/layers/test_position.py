"""The position table at other sizes."""

from __future__ import annotations

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
