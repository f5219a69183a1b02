"""Average precision of a ranking, in the two forms in use.

Images with equal scores are retrieved together: their order is not the ranking's, so it does not change the result.
"""

from __future__ import annotations

import numpy as np


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Sum over the thresholds of (recall gained) x (precision there), as scikit-learn's ``average_precision_score``.

    Args:
        scores: [N], higher is more likely.
        positive: [N] bool.

    Returns:
        In 0..1.

    Raises:
        ValueError: if nothing is positive.
    """
    hits, retrieved = _counts(scores, positive)
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float((gained * (hits / retrieved)).sum())


def eleven_point_average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """The measure of PASCAL VOC 2007: the mean over the recalls 0, 0.1 ... 1 of the best precision at that recall or above.

    Arguments, range and errors are those of ``average_precision``.
    """
    hits, retrieved = _counts(scores, positive)
    precision = hits / retrieved
    # recall >= i / 10 in whole numbers: 0.3 has no exact float
    return float(np.mean([precision[10 * hits >= i * hits[-1]].max() for i in range(11)]))


def _counts(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By falling threshold: how many positive images, and how many images, have that score or more; each [T] int64."""
    if not positive.any():
        raise ValueError(f"Average precision needs a positive image, and there is none among {len(positive)}.")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    return np.cumsum(positive[order], dtype=np.int64)[ends], ends + 1
