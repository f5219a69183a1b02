"""Trees in the layout of VOCdevkit/VOC2007, drawn by the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dinoengine.data.datasets.voc2007 import CLASSES

SIZE_PX = 20


def draw_labels(num_images: int, seed: int) -> np.ndarray:
    """[N, 20] int8 of 1, 0 and -1: image i shows class i (modulo 20) for certain; others at random."""
    labels = np.random.default_rng(seed).choice(np.array([1, 0, -1], np.int8), (num_images, 20), p=(0.2, 0.1, 0.7))
    labels[np.arange(num_images), np.arange(num_images) % 20] = 1
    return labels


def write_voc_split(root: Path, split: str, labels: np.ndarray, first: int = 0) -> str:
    """Files of a split and its images, 20 x 20 pixels, row k white where class k is shown; returns the dataset string.

    Args:
        labels: [N, 20]; of difficult objects every second image shows the white row.
        first: number in the name of the first image.
    """
    pictures, lists = root / "JPEGImages", root / "ImageSets" / "Main"
    for folder in (pictures, lists):
        folder.mkdir(parents=True, exist_ok=True)
    names = [f"{first + i:06d}" for i in range(len(labels))]
    for i, name in enumerate(names):
        shown = (labels[i] == 1) | ((labels[i] == 0) & (i % 2 == 0))
        pixels = np.where(shown, 220, 20).astype(np.uint8)[:, None].repeat(SIZE_PX, axis=1)
        Image.fromarray(pixels).convert("RGB").save(pictures / f"{name}.jpg", quality=95)
    for k, class_name in enumerate(CLASSES):
        lines = [f"{name} {labels[i, k]:2d}\n" for i, name in enumerate(names)]
        (lists / f"{class_name}_{split}.txt").write_text("".join(lines))
    return f"voc2007:root={root}:split={split}"
