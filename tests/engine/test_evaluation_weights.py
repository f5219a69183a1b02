"""What --eval-only evaluates."""

from __future__ import annotations

import pytest
import torch

from dinoengine.config import CfgNode, ConfigError
from dinoengine.engine.evaluation_weights import load_weights_for_evaluation


def test_nothing_to_evaluate_is_an_error(tiny_cfg: CfgNode) -> None:
    for resume in (False, True):
        with pytest.raises(ConfigError, match="MODEL.WEIGHTS: is empty, so there is nothing to evaluate"):
            load_weights_for_evaluation(tiny_cfg, torch.nn.Linear(1, 1), resume=resume)
