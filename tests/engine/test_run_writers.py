"""Which writers a run has."""

from __future__ import annotations

from pathlib import Path

from dinoengine.engine import default_writers
from dinoengine.utils.writers import ConsoleWriter, JSONWriter, TensorboardXWriter


def test_default_writers(tmp_path: Path) -> None:
    writers = default_writers(str(tmp_path / "new"), 10)
    assert [type(w) for w in writers] == [ConsoleWriter, JSONWriter, TensorboardXWriter]
    assert len(default_writers(str(tmp_path), 10, tensorboard=False)) == 2
    for writer in writers:
        writer.close()
