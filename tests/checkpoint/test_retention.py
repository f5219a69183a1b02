"""Which checkpoints may go: properties over many folders, and the cases a user thinks of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoengine.checkpoint.retention import to_remove

FOLDERS = st.sets(st.integers(0, 60), max_size=20)


@given(FOLDERS, st.integers(0, 60), st.integers(0, 6), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_for_every_folder(others: set[int], current: int, max_to_keep: int, keep_every: int) -> None:
    folder = others | {current}
    removed = to_remove(folder, current=current, max_to_keep=max_to_keep, keep_every=keep_every)
    left = folder - set(removed)
    protected = {i for i in folder if keep_every and (i + 1) % keep_every == 0}
    assert set(removed) <= folder
    assert len(set(removed)) == len(removed)
    assert {current, *protected} <= left
    if not max_to_keep:
        assert not removed
        return
    # No more than asked for, and no fewer while there are some: the current one counts unless it is protected anyway.
    assert len(left - protected) == min(max_to_keep, len(folder - protected))
    # What goes is older than what stays: earlier iterations of this run, or left behind by another.
    kept = left - protected
    for gone in removed:
        assert all(stays > gone for stays in kept if (stays <= current) == (gone <= current))
        assert gone > current or not any(stays > current for stays in kept)
    # Once is enough.
    assert not to_remove(left, current=current, max_to_keep=max_to_keep, keep_every=keep_every)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 4), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_along_a_run(period: int, max_to_keep: int, every: int, num_saves: int) -> None:
    """The newest files and the milestones, whether the run is resumed in between or not: the folder is all it knows."""
    folder: set[int] = set()
    for save in range(1, num_saves + 1):
        current = save * period - 1
        folder.add(current)
        folder -= set(to_remove(folder, current=current, max_to_keep=max_to_keep, keep_every=every * period))
    saved = [save * period for save in range(1, num_saves + 1)]
    milestones = {done for done in saved if every and done % (every * period) == 0}
    newest = [done for done in saved if done not in milestones][-max_to_keep:]
    assert folder == {done - 1 for done in milestones | set(newest)}


@pytest.mark.parametrize(
    ("folder", "options", "expected"),
    [
        ([9, 19, 29], {"current": 29, "max_to_keep": 2}, [9]),
        ([9, 19, 29], {"current": 29, "max_to_keep": 0, "keep_every": 20}, []),
        (
            [9, 19, 29, 39],
            {"current": 39, "max_to_keep": 1, "keep_every": 20},
            [9],
        ),  # 19 and 39 stay, and 29 beside them
        ([9, 19, 69, 79], {"current": 19, "max_to_keep": 2}, [69, 79]),  # it went back behind 69
        ([9, 19, 69, 79], {"current": 19, "max_to_keep": 3}, [69]),
    ],
)
def test_by_hand(folder: list[int], options: dict[str, int], expected: list[int]) -> None:
    assert to_remove(folder, **options) == expected
