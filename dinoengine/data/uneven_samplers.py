"""Streams in which images do not come equally often: classes do, or each image has a weight.

Pure functions of seed and position, as in ``samplers``.
"""

from __future__ import annotations

import os

import numpy as np

from dinoengine.data.samplers import TrainingSampler
from dinoengine.utils.env import hash_seed

_CLASSES, _IMAGES, _SLOTS, _OFFSET = 0xC1A55, 0x1A6E5, 0x5107, 0x0FF5


class ClassBalancedSampler:
    """An infinite stream in which every run of as many positions as there are classes contains each class once.

    The n-th draw from a class is the n-th image of that class's own stream, so each goes through all of its images,
    reshuffled at every pass; those of a small class come more often. Looking up any position takes O(1) time. Memory: 4
    bytes per image (8 from 2**31 images on) that forked workers share, and a few hundred per class.
    """

    def __init__(self, labels: np.ndarray, seed: int) -> None:
        """
        Args:
            labels: [images] whole numbers >= 0; a class without images takes no position.

        Raises:
            ValueError: if there is no image, or one has a negative label.
        """
        if not len(labels) or labels.min() < 0:
            raise ValueError(f"A class-balanced sampler needs images that all have a label, got {len(labels)} labels.")
        counts = np.bincount(labels)
        ends = np.cumsum(counts)
        present = np.flatnonzero(counts)
        # Replacements of bad images come from the same run of this many positions.
        self.size = len(labels)
        self._order = np.argsort(labels, kind="stable").astype(np.int32 if len(labels) < 1 << 31 else np.int64)
        self._starts = (ends - counts)[present].tolist()
        self._classes = TrainingSampler(len(present), hash_seed(seed, _CLASSES))
        self._images = [TrainingSampler(int(counts[k]), hash_seed(seed, _IMAGES, int(k))) for k in present]

    def index_at(self, position: int) -> int:
        """Index of the image at ``position`` >= 0."""
        which = self._classes.index_at(position)
        place = self._images[which].index_at(position // self._classes.size)
        return int(self._order[self._starts[which] + place])


class WeightedSampler:
    """An infinite stream in which images come as often as their weights say.

    Of every run of ``size`` positions (a pass) image i takes ``size * weight[i] / sum of weights`` on average, and in each
    pass that number rounded down or up: systematic sampling (Madow, "On the Theory of Systematic Sampling, II", 1949) with
    an offset of its own in every pass, in random order. Equal weights give every image once per pass. Looking up any
    position takes O(log size) time, about 30 comparisons for 10**9 images. Memory: 8 bytes per image that forked workers
    share.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        """
        Args:
            weights: [images], in any unit; 0: never.

        Raises:
            ValueError: if one is negative or not finite, or none is above 0.
        """
        ends = np.cumsum(weights, dtype=np.float64)
        if not len(ends) or not (weights.min() >= 0 and np.isfinite(ends[-1]) and ends[-1] > 0):
            raise ValueError("Weights of images are numbers >= 0, not all of them 0.")
        self.size, self.seed = len(ends), seed
        ends *= self.size / ends[-1]
        self._ends = ends
        self._slots = TrainingSampler(self.size, hash_seed(seed, _SLOTS))

    def index_at(self, position: int) -> int:
        """Index of the image at ``position`` >= 0."""
        offset = hash_seed(self.seed, _OFFSET, position // self.size) / 2**63
        place = min(self._slots.index_at(position) + offset, np.nextafter(self._ends[-1], 0))
        return int(np.searchsorted(self._ends, place, side="right"))


def read_sample_weights(path: str, num_images: int) -> np.ndarray:
    """The array of a .npy file, mapped into memory: [num_images] of whole or floating-point numbers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no .npy file of that shape.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"DATALOADER.SAMPLE_WEIGHTS: there is no file {path}.")
    expected = (
        f"a file of numpy.save with a number for each of the {num_images} images of DATASETS.TRAIN, in their order"
    )
    try:
        weights = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"DATALOADER.SAMPLE_WEIGHTS is {expected}; {path} cannot be read ({error}).") from error
    if not isinstance(weights, np.ndarray) or weights.shape != (num_images,) or weights.dtype.kind not in "iuf":
        found = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, np.ndarray) else "several arrays"
        raise ValueError(f"DATALOADER.SAMPLE_WEIGHTS is {expected}; {path} holds {found}.")
    return weights
