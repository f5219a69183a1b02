"""The comparison with other libraries: what it says without them, and that it can fail with them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor, nn
from torch.nn import functional

from dinoengine.checkpoint.parity import Comparison
from dinoengine.evaluation.numerics import libraries
from dinoengine.evaluation.numerics.quantity import Quantity
from dinoengine.modeling.layers.layer_scale import LayerScale
from dinoengine.modeling.layers.mlp import SwiGLU
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
    assert len(quantities) == 4
    assert {q.verdict for q in quantities} == {"not installed"}
    assert {q.note for q in quantities} == {note}


@pytest.mark.parametrize("check", [libraries.check_timm, libraries.check_transformers])
def test_a_layer_that_does_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], Iterator[Quantity]]
) -> None:
    monkeypatch.setattr(LayerScale, "forward", nn.Identity.forward)  # in ours; timm has its own
    assert len(failures(check)) == 4


def test_nan_at_one_size_fails_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = [Comparison("native size", 0.0, 1.0), Comparison("other size", math.nan, 1.0)]
    monkeypatch.setattr(libraries, "compare_files", lambda *_: comparisons)
    assert len(failures(libraries.check_timm)) == 4


@pytest.mark.parametrize("check", [libraries.check_timm, libraries.check_transformers])
def test_gate_and_value_in_the_other_order_fail_where_the_ffn_is_swiglu(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], Iterator[Quantity]]
) -> None:
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: self.w3(_value_gates(*self.w12(x).chunk(2, dim=-1))))
    failed = failures(check)
    assert len(failed) == 2
    assert all("SwiGLU" in name for name in failed)


def _value_gates(gate: Tensor, value: Tensor) -> Tensor:
    return gate * functional.silu(value)
