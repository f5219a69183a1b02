#!/usr/bin/env python
"""Linear accuracy of Fashion-MNIST's raw pixels: what a recipe's linear probe is to be compared with.

Logistic regression (L-BFGS) on mean-centred pixels. C is chosen on a held-out tenth of the training images; then the
regression is fitted to all of them.

    python benchmarks/fashion_mnist_pixels.py
"""

from __future__ import annotations

import numpy as np

from dinoengine.data import FashionMNIST
from dinoengine.evaluation.logreg import LogregSettings, Regression, Rows, choose_c, split_held_out
from dinoengine.utils.console import run_tool

SETTINGS = LogregSettings(cs=tuple(10.0 ** np.linspace(-3, 1, 9)), max_iter=300, tol=1e-4)


def pixels(split: str) -> Rows:
    images = FashionMNIST(split)
    rows = np.stack([np.asarray(images.load(i), dtype=np.float64).reshape(-1) / 255 for i in range(len(images))])
    return Rows(rows, np.array([images.label(i) for i in range(len(images))]))


def main() -> int:
    train, test = pixels("train"), pixels("test")
    mean = train.features.mean(axis=0)
    train, test = Rows(train.features - mean, train.labels), Rows(test.features - mean, test.labels)
    fit, judge = (Rows(train.features[i], train.labels[i]) for i in split_held_out(train.labels, 0.1, SETTINGS.seed))
    choice = choose_c(fit, judge, SETTINGS)
    regression = Regression(SETTINGS)
    regression.fit(train, choice.c)
    print(f"raw pixels, logistic regression: top-1 {100 * regression.hits(test, 1).mean():.2f} % (C {choice.c:.3g})")
    return 0


if __name__ == "__main__":
    run_tool(main)
