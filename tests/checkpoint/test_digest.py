"""What counts for the digest of a checkpoint's content, and what does not."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinoengine.checkpoint.digest import content_digest

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values, dtype=dtype),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
CONTENTS = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def _same(first: Any, second: Any) -> bool:
    """The oracle: equal in kind and in every bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        return first.hex() == second.hex() if math.isfinite(first) else repr(first) == repr(second)
    if isinstance(first, dict):
        keys = {(type(k), k) for k in first} == {(type(k), k) for k in second}
        return keys and all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


@given(CONTENTS, CONTENTS)
@settings(max_examples=60, deadline=None)
def test_two_contents_have_one_digest_only_if_they_are_the_same(first: Any, second: Any) -> None:
    assert content_digest(copy.deepcopy(first)) == content_digest(first)
    assert (content_digest(first) == content_digest(second)) == _same(first, second)


@given(CONTENTS)
@settings(max_examples=50, deadline=None)
def test_a_file_keeps_it(content: Any) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    assert content_digest(torch.load(file, weights_only=True)) == content_digest(content)


def test_the_encoding_is_as_documented() -> None:
    """By hand, so that files of today can be verified by later versions."""
    expected = b"d2;" + b"str1;a" + b"l2;" + b"int1;7" + b"NoneType4;None"
    expected += b"str1;b" + b"t(2,) torch.float32;" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    content = {"b": torch.tensor([1.0, -2.0]), "a": [7, None]}
    assert content_digest(content) == hashlib.sha256(expected).hexdigest()


def test_order_of_entries_and_kind_of_dict_and_strides_do_not_count() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    first = {"a": matrix, "b": 1}
    assert content_digest(first) == content_digest(OrderedDict([("b", 1), ("a", matrix.t().contiguous().t())]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ("1", 1),
        ([1, 2], (1, 2)),
        (["ab", "c"], ["a", "bc"]),
        ([[], 1], [[1]]),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
        (torch.zeros(0), torch.zeros(0, 1)),
        (torch.tensor(1.0), torch.tensor([1.0])),
    ],
)
def test_what_counts(first: Any, second: Any) -> None:
    assert content_digest(first) != content_digest(second)


def test_what_cannot_be_read_back_is_named() -> None:
    with pytest.raises(TypeError, match=r"trainer\.hooks\.0 is a builtins\.bytes; a checkpoint holds tensors"):
        content_digest({"trainer": {"hooks": [b"x"]}})
    import numpy as np

    with pytest.raises(TypeError, match=r"lr is a numpy\.float64"):
        content_digest({"lr": np.float64(1.0)})
