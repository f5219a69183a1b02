"""Folders of small images with masks, drawn by the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASS_NAMES = ("background", "red disc", "green square")
COLOURS = np.array([[60, 60, 60], [230, 40, 30], [30, 200, 60]], dtype=np.float64)
SIZE_PX, CELL_PX = 32, 4


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image [32, 32, 3] and its mask [32, 32], uint8: a disc and a square on a background, edges on a 4-pixel grid.

    Classes are told by colour; a little noise. The first row of cells is ignored.
    """
    rng = np.random.default_rng(seed)
    cells = np.zeros((SIZE_PX // CELL_PX,) * 2, dtype=np.uint8)
    rows, columns = np.mgrid[: len(cells), : len(cells)]
    centre = rng.integers(2, 6, 2)
    cells[np.hypot(rows - centre[0], columns - centre[1]) < 2] = 1
    top, left = rng.integers(1, 5, 2)
    cells[top : top + 3, left : left + 3] = 2
    mask = np.kron(cells, np.ones((CELL_PX, CELL_PX), dtype=np.uint8))
    image = COLOURS[mask] + rng.normal(0, 10, (SIZE_PX, SIZE_PX, 1))
    mask[:CELL_PX] = 255
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_mask_folder(root: Path, num_images: int, first_seed: int = 0) -> str:
    """``images/``, ``masks/`` and ``classes.txt`` below ``root``; returns the dataset string."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    for i in range(num_images):
        image, mask = draw(first_seed + i)
        Image.fromarray(image).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
    return f"masks:{root}"
