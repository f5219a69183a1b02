from __future__ import annotations

import pytest
import torch

from dinoengine.data import build_dataset
from dinoengine.evaluation.finite import FiniteCheck


def test_images_that_are_not_finite_are_named_in_order() -> None:
    check = FiniteCheck(None)
    values = torch.zeros(4, 2, 3)
    values[1, 0, 2], values[3, 1, 1] = torch.nan, torch.inf
    check.see(values, torch.tensor([9, 8, 7, 6]))
    check.see(torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"features of 2 of 6 images are not finite, e\.g\. images number \[6, 8\]"):
        check.finish()


def test_finite_values_pass() -> None:
    check = FiniteCheck(None)
    check.see(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    check.see(torch.full((1, 2), 3e38), torch.tensor([0]))
    check.finish()


def test_images_are_named_by_their_dataset_with_what_and_why() -> None:
    dataset = build_dataset("synthetic:num_images=9:size=8")
    check = FiniteCheck(dataset, "scores", "They are too large.")
    check.see(torch.full((8, 2), torch.inf), torch.arange(8))
    expected = r"^The scores of 8 of 8 images are not finite, e\.g\. synthetic:seed=0\[0\], .*synthetic:seed=0\[4\]\. They are too large\.$"
    for finish in (check.finish, check.finish_here, lambda: check.finish_batch(torch.device("cpu"))):
        with pytest.raises(ValueError, match=expected):
            finish()
