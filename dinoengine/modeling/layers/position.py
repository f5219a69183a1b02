"""The learned position table at other image sizes, exactly as the published DINOv2 weights expect."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def interpolate_position_table(
    table: Tensor, table_grid: tuple[int, int], grid: tuple[int, int], *, antialias: bool, offset: float
) -> Tensor:
    """Resample the patch part of a position table to another grid, bicubic, in fp32.

    The published models without registers passed ``scale_factor = (size + 0.1) / table_size`` instead of the size, which
    shifts the sampling points; the weights were trained so. Interpolating "cleanly" changes the table by tens of
    percent at other sizes.

    Args:
        table: [1, 1 + N0, D], the CLS position first; N0 = product of ``table_grid``, row-major.
        table_grid: (rows, columns) the table was learned at.
        grid: (rows, columns) wanted.
        antialias: as in ``torch.nn.functional.interpolate``.
        offset: added to the target size for the scale factor; 0 passes the size itself.

    Returns:
        [1, 1 + N, D] in the table's dtype; the table itself when the grids are equal.
    """
    assert table.shape[1] == 1 + table_grid[0] * table_grid[1], (list(table.shape), table_grid)
    if grid == table_grid:
        return table
    cls_position, patches = table[:, :1], table[:, 1:]
    patches = patches.float().reshape(1, *table_grid, -1).permute(0, 3, 1, 2)  # [1, D, rows0, columns0]
    if offset:
        scale = ((grid[0] + offset) / table_grid[0], (grid[1] + offset) / table_grid[1])
        resized = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    assert resized.shape[-2:] == torch.Size(grid), (list(resized.shape), grid)
    resized = resized.permute(0, 2, 3, 1).flatten(1, 2)  # [1, N, D]
    return torch.cat((cls_position, resized.to(table.dtype)), dim=1)
