"""Procedural labelled images, for tests, benchmarks and first steps without data."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from dinoengine.data.catalog import DATASET_REGISTRY
from dinoengine.data.dataset import ImageDataset
from dinoengine.utils.env import hash_seed

SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "stripes", "checks")


@DATASET_REGISTRY.register("synthetic")
class Synthetic(ImageDataset):
    """``synthetic:num_images=1000:num_classes=10:size=64:seed=0``: one textured shape on a noisy background.

    The class decides shape and texture; position, size, angle, colours and noise are random. An image is a pure
    function of (seed, index); classes take turns.
    """

    def __init__(self, num_images: int = 1000, num_classes: int = 10, size: int = 64, seed: int = 0) -> None:
        """
        Args:
            size: edge of the square RGB images in pixels.

        Raises:
            ValueError: for a number of images, classes or pixels that cannot be.
        """
        most = len(SHAPES) * len(TEXTURES)
        if not 1 <= num_images <= sys.maxsize or size < 4 or not 1 <= num_classes <= most:
            raise ValueError(
                f"synthetic needs 1 <= num_images <= {sys.maxsize}, size >= 4 and 1 <= num_classes <= {most}; "
                f"got num_images={num_images}, size={size}, num_classes={num_classes}."
            )
        self.num_images, self.num_classes, self.size, self.seed = num_images, num_classes, size, seed
        names = [f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES]
        self.class_names = names[:num_classes]

    def __len__(self) -> int:
        return self.num_images

    def label(self, index: int) -> int | None:
        return index % self.num_classes

    def load(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.render(index))

    def render(self, index: int) -> np.ndarray:
        """The image as [size, size, 3] uint8."""
        rng = np.random.Generator(np.random.Philox(hash_seed(self.seed, index)))
        label = index % self.num_classes
        shape, texture = SHAPES[label % len(SHAPES)], TEXTURES[label // len(SHAPES)]
        centre = rng.uniform(0.35, 0.65, 2)
        radius = rng.uniform(0.18, 0.32)
        angle = rng.uniform(0, 2 * math.pi)
        axis = (np.arange(self.size) + 0.5) / self.size
        dy, dx = np.meshgrid(axis - centre[0], axis - centre[1], indexing="ij")
        u = (math.cos(angle) * dx + math.sin(angle) * dy) / radius  # the shape's own coordinates, about -1..1 inside
        v = (math.cos(angle) * dy - math.sin(angle) * dx) / radius
        inside = _inside(shape, u, v)
        waves = {
            "plain": np.ones_like(u),
            "stripes": np.sin(6 * u) > 0,
            "checks": np.sin(6 * u) * np.sin(6 * v) > 0,
        }
        paint = waves[texture].astype(np.float64)[..., None]
        background, first, second = rng.uniform(0, 255, (3, 3))
        colour = paint * first + (1 - paint) * second
        image = np.where(inside[..., None], colour, background) + rng.normal(0, 12, (self.size, self.size, 1))
        return np.clip(image, 0, 255).astype(np.uint8)

    def describe(self, index: int) -> str:
        return f"synthetic:seed={self.seed}[{index}]"


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    distance = np.hypot(u, v)
    if shape == "disc":
        return distance < 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.85
    if shape == "triangle":
        return (v > -0.6) & (v < 1.0 - 1.8 * abs(u))
    if shape == "ring":
        return (distance < 1) & (distance > 0.55)
    assert shape == "cross", shape
    return (np.maximum(abs(u), abs(v)) < 1) & (np.minimum(abs(u), abs(v)) < 0.3)
