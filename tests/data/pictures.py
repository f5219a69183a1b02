"""Images that behave as photographs do when they are scaled and compressed."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(seed: int) -> Image.Image:
    """200 x 150, RGB: blobs of all sizes; the spectrum falls with the frequency."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((150, 200))
    for n in (1, 2, 4, 8):
        blobs = Image.fromarray(rng.uniform(0, 255, (3 * n, 4 * n)).astype(np.float32))
        pixels += np.asarray(blobs.resize((200, 150))) / n
    grey = (200 * (pixels - pixels.min()) / np.ptp(pixels) + 20).astype(np.uint8)
    return Image.fromarray(np.stack([grey, grey // 2, 255 - grey], axis=2))
