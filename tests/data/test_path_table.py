from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoengine.data.path_table import PathTable

TEXTS = ["", "a/1.png", "日本/ü 1.png", "caf\udce9.png", "", "new\nline"]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=8))
def test_a_table_is_its_list(texts: list[str]) -> None:
    table = PathTable.of(texts)
    assert len(table) == len(texts)
    assert [table[i] for i in range(len(texts))] == list(table) == texts


def test_odd_texts_survive_pickling() -> None:
    table = pickle.loads(pickle.dumps(PathTable.of(TEXTS)))
    assert list(table) == TEXTS
    assert table[3] == "caf\udce9.png"


def test_an_index_outside_is_refused() -> None:
    for index in (-1, len(TEXTS)):
        with pytest.raises(IndexError, match=r"0\.\.5"):
            PathTable.of(TEXTS)[index]
