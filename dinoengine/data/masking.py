"""Which patches the student does not see (iBOT, arXiv:2111.07832; block shapes of BEiT, arXiv:2106.08254)."""

from __future__ import annotations

import math

import numpy as np

from dinoengine.data.random_streams import MASK_BLOCKS, MASK_PLAN, position_rng

_TRIES_PER_BLOCK = 10


class BlockMasking:
    """Cover a grid with random rectangles until exactly the wanted number of cells is masked.

    Blocks are drawn as published: area between ``min_block_patches`` and what is still to be masked (at most half the
    grid), log-uniform aspect ratio, smaller than the grid in both directions, kept if it adds at least one new cell and
    not too many. The published generator stops when ten draws in a row fail, about 8 % of the time a few cells short;
    here the rest is then filled with random free cells, so the number is exact.
    """

    def __init__(self, grid: tuple[int, int], min_block_patches: int = 4, min_aspect: float = 0.3) -> None:
        """
        Args:
            grid: (rows, columns).
            min_aspect: smallest height over width of a block, 0 < a <= 1; the largest is 1 / a.
        """
        self.grid = grid
        self.min_block_patches = min_block_patches
        self.min_aspect = min_aspect
        self.max_block_patches = max(1, grid[0] * grid[1] // 2)

    def __repr__(self) -> str:
        return (
            f"BlockMasking(grid={self.grid}, min_block_patches={self.min_block_patches}, min_aspect={self.min_aspect})"
        )

    def __call__(self, num_masked: int, rng: np.random.Generator) -> np.ndarray:
        """A bool array [rows, columns] with exactly ``num_masked`` True cells.

        Raises:
            ValueError: if the grid has fewer cells.
        """
        rows, columns = self.grid
        if not 0 <= num_masked <= rows * columns:
            raise ValueError(f"Cannot mask {num_masked} of the {rows * columns} patches of a {rows} x {columns} grid.")
        mask = np.zeros(self.grid, dtype=bool)
        missing = num_masked
        while missing > 0:
            added = self._add_block(mask, missing, rng)
            if added == 0:
                free = np.flatnonzero(~mask)
                mask.flat[rng.choice(free, missing, replace=False)] = True
                break
            missing -= added
        return mask

    def _add_block(self, mask: np.ndarray, missing: int, rng: np.random.Generator) -> int:
        """Try to add one block of at most ``missing`` new cells in place; returns how many it added."""
        rows, columns = self.grid
        widest = abs(math.log(self.min_aspect))
        most = min(missing, self.max_block_patches)
        # With few cells to go the limits change places, as published: blocks then get smaller than the smallest.
        limits = sorted((self.min_block_patches, most))
        for _ in range(_TRIES_PER_BLOCK):
            area = rng.uniform(*limits)
            aspect = math.exp(rng.uniform(-widest, widest))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top = int(rng.integers(0, rows - height + 1))
            left = int(rng.integers(0, columns - width + 1))
            block = mask[top : top + height, left : left + width]
            new = height * width - int(block.sum())
            if 0 < new <= most:  # rounding its sides can make a block larger than its area
                block[:] = True
                return new
        return 0


class MaskPlan:
    """How many patches of which global crop are masked, for a global batch at a time.

    Of the G * B global crops of a batch exactly ``int(G * B * crop_share)`` are masked. Their shares are stratified:
    crop i of n gets ``int(N * u)`` patches with u uniform between the edges i and i + 1 of ``linspace(low, high, n + 1)``;
    which crop gets which is shuffled over the batch. The plan depends on (seed, index of the batch) and the blocks of
    a crop on (seed, position, view): every rank and worker draws its own part of the same plan.
    """

    def __init__(
        self,
        masking: BlockMasking,
        *,
        batch_size: int,
        seed: int,
        crop_share: float = 0.5,
        ratio: tuple[float, float] = (0.1, 0.5),
        num_views: int = 2,
    ) -> None:
        """
        Args:
            batch_size: images of the *global* batch.
            ratio: smallest and largest masked share of a masked crop.
        """
        self.masking = masking
        self.batch_size = batch_size
        self.seed = seed
        self.crop_share = crop_share
        self.ratio = ratio
        self.num_views = num_views
        self._counts: tuple[int, np.ndarray] = (-1, np.zeros((num_views, batch_size), dtype=np.int64))

    def counts(self, batch_index: int) -> np.ndarray:
        """Masked patches of every global crop of a batch, int64 [views, batch_size]."""
        if self._counts[0] != batch_index:
            rng = position_rng(self.seed, batch_index, MASK_PLAN)
            num_patches = self.masking.grid[0] * self.masking.grid[1]
            num_crops = self.num_views * self.batch_size
            num_masked = int(num_crops * self.crop_share)
            edges = np.linspace(*self.ratio, num_masked + 1)
            counts = np.zeros(num_crops, dtype=np.int64)
            counts[:num_masked] = num_patches * rng.uniform(edges[:-1], edges[1:])
            self._counts = (batch_index, rng.permutation(counts).reshape(self.num_views, self.batch_size))
        return self._counts[1]

    def masks(self, positions: list[int]) -> np.ndarray:
        """Masks of the crops at these positions, view-major: bool [views * len(positions), N]."""
        rows = []
        for view in range(self.num_views):
            for position in positions:
                batch_index, slot = divmod(position, self.batch_size)
                count = int(self.counts(batch_index)[view, slot])
                rng = position_rng(self.seed, position, MASK_BLOCKS, view)
                rows.append(self.masking(count, rng).ravel())
        return np.stack(rows)
