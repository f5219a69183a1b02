"""Which dtypes losses compute in."""

import pytest
import torch

from dinoengine.modeling.losses.precision import at_least_fp32


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_lower_precisions_are_raised_and_higher_kept(given: torch.dtype, computed: torch.dtype) -> None:
    assert at_least_fp32(torch.ones(1, dtype=given)).dtype == computed
