"""Which periodic checkpoints may go. A pure function; who calls it has put the newest on disk first."""

from __future__ import annotations

from collections.abc import Iterable


def to_remove(iterations: Iterable[int], *, current: int, max_to_keep: int, keep_every: int = 0) -> list[int]:
    """The periodic checkpoints to delete once that of ``current`` is on disk and is the last checkpoint.

    Files of later iterations are left behind by a run that went back to an earlier checkpoint, and go first. That of
    ``current`` always stays: it is the last good one.

    Args:
        iterations: those that there are files of (``model_<iteration>.pth``; ``iteration + 1`` are done in it).
        max_to_keep: number of files that stay beside those of ``keep_every``; 0 keeps all.
        keep_every: files in which a multiple of this number of iterations is done are never deleted; 0: there are none.

    Returns:
        Iterations, in the order in which they are to be deleted.
    """
    if not max_to_keep:
        return []
    candidates = [i for i in sorted(set(iterations)) if not (keep_every and (i + 1) % keep_every == 0)]
    left_behind = [i for i in candidates if i > current]
    of_this_run = [i for i in candidates if i <= current]
    return (left_behind + of_this_run)[:-max_to_keep]
