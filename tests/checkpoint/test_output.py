"""A result takes its place whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.output import checked_output, require_agreement, require_free
from dinoengine.checkpoint.parity import Comparison


def _tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_file_or_a_folder_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    for name in ("file", "folder", "folder"):
        target = tmp_path / name
        with checked_output(str(target)) as written:
            assert not target.exists() or _tree(target) == {"config.json": "0"}
            if name == "folder":
                os.mkdir(written)
                Path(written, "config.json").write_text("0")
            else:
                Path(written).write_text("1")
    assert _tree(tmp_path) == {"file": "1", "folder/config.json": "0"}


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    (tmp_path / "out.data").write_text("before")

    def write() -> None:
        with checked_output(str(tmp_path / "out"), [str(tmp_path / "out.data")]) as written:
            Path(written).write_text("after")
            require_agreement([Comparison("it", 1.0, 1.0)], "It is wrong")

    with pytest.raises(CheckpointError, match="It is wrong"):
        write()
    assert _tree(tmp_path) == {"out": "before", "out.data": "before"}


def test_a_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("before")
    with pytest.raises(FileNotFoundError), checked_output(str(tmp_path / "out")):
        pass  # nothing was written
    assert _tree(tmp_path) == {"out/config.json": "before"}


@pytest.mark.parametrize("has_data", [True, False])
def test_what_belongs_to_the_file_is_replaced_or_removed_with_it(has_data: bool, tmp_path: Path) -> None:
    for name in ("out", "out.data", "other"):
        (tmp_path / name).write_text("before")
    with checked_output(str(tmp_path / "out"), [str(tmp_path / "out.data")]) as written:
        Path(written).write_text("after")
        if has_data:
            Path(f"{written}.data").write_text("after")
    assert _tree(tmp_path) == {"other": "before", "out": "after"} | ({"out.data": "after"} if has_data else {})


def test_agreement_is_demanded_of_what_must_agree() -> None:
    fine = [Comparison("a", 0.0, 1.0), Comparison("b", 1.0, 1.0, must_agree=False)]
    require_agreement(fine, "It is wrong")
    with pytest.raises(CheckpointError, match=r"It is wrong, so nothing was written: c: max abs difference nan"):
        require_agreement([*fine, Comparison("c", float("nan"), 1.0)], "It is wrong")


def test_a_link_to_the_folder_of_the_source_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    (tmp_path / "hf-2").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    source = str(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="IN lies in OUT, the folder"):
        require_free(str(tmp_path / "link"), overwrite=True, source=source)
    require_free(str(tmp_path / "hf-2"), overwrite=True, source=source)  # its name alone begins like the other's
