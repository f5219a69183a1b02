"""The comparison with other libraries: what it says without them, and that it can fail with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
from torch import nn

from dinoengine.evaluation.numerics import libraries
from dinoengine.evaluation.numerics.quantity import Quantity
from dinoengine.modeling.layers.layer_scale import LayerScale
from tests.evaluation.numerics.failures import failures


@pytest.mark.parametrize(
    ("check", "missing", "note"),
    [
        (libraries.check_timm, {"timm"}, "timm is not installed"),
        (libraries.check_transformers, {"transformers"}, "transformers is not installed"),
    ],
)
def test_without_the_library_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], Iterator[Quantity]], missing: set[str], note: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())
    quantities = list(check())
    assert len(quantities) == 2
    assert {q.verdict for q in quantities} == {"not installed"}
    assert {q.note for q in quantities} == {note}


@pytest.mark.parametrize("check", [libraries.check_timm, libraries.check_transformers])
def test_a_layer_that_does_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], Iterator[Quantity]]
) -> None:
    monkeypatch.setattr(LayerScale, "forward", nn.Identity.forward)  # in ours; timm has its own
    assert len(failures(check)) == 2
