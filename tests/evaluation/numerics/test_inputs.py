"""The counts of masks and blur fail where another number comes out."""

from __future__ import annotations

from functools import partial

import pytest

from dinoengine.config import defaults
from dinoengine.data import BlockMasking, MaskPlan
from dinoengine.evaluation.numerics import inputs
from tests.evaluation.numerics.failures import failures


def test_another_share_of_crops_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MaskPlan", partial(MaskPlan, crop_share=0.6))
    failed = failures(inputs.check_masks)
    assert failed[:2] == ["share of masked patches of all global crops", "masked crops of 128"]
    assert "batches of 64 images with more than 3771 masked patches" in failed


def test_blocks_that_stop_short_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockMasking.__call__
    monkeypatch.setattr(BlockMasking, "__call__", lambda self, count, rng: original(self, max(count - 1, 0), rng))
    assert failures(inputs.check_masks) == ["crops with another number of masked patches than planned"]


def test_blur_as_declared_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code declares (1.0, 0.1, 0.5) and applies (0.0, 0.9, 0.5)."""
    monkeypatch.setattr(inputs, "BLUR_DRAWS", 60)
    assert failures(inputs.check_blur) == []
    monkeypatch.setitem(defaults._C.INPUT.BLUR, "PROBS", (1.0, 0.1, 0.5))
    assert failures(inputs.check_blur) == ["blurred share, global view 1", "blurred share, global view 2"]
