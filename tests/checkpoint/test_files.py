"""Files of any origin are data: read, or refused in one sentence."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.files import grouped_names, read_file, read_safetensors, short_list


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


def test_pickled_code_is_refused_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": _Bomb(str(tmp_path / "owned"))}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth was refused(?s:.)*could run code(?s:.)*save its tensors alone"):
        read_file(str(tmp_path / "x.pth"))
    assert not (tmp_path / "owned").exists()
    with pytest.raises(CheckpointError, match=r"\(found: posix\.mkdir\)$"):
        read_file(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(("name", "read"), [("x.pth", read_file), ("x.safetensors", read_safetensors)])
def test_every_truncation_and_garbage_is_one_clear_error(name: str, read: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save({"a": torch.arange(100.0)}, path)
    else:
        save_file({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    cut = b"\x80\x02}q\x00(X\x01"  # a pickle that ends within the length of a string
    for content in (b"", b"x", whole[:7], whole[: len(whole) // 2], whole[:-1], b"PK\3\4" + whole[9:], b"\0" * 50, cut):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read(str(path))


def test_a_missing_file_is_no_checkpoint_error(tmp_path: Path) -> None:
    for name, read in (("x.pth", read_file), ("x.safetensors", read_safetensors)):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            read(str(tmp_path / name))


def test_names_in_messages() -> None:
    assert grouped_names(["a.b.x", "a.b.y", "c", "d"]) == ["c", "d", "a.b.{x, y}"]
    assert short_list([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 ... and 2 more"


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_flipped_bit_is_read_or_refused(is_zip: bool, tmp_path: Path) -> None:
    """The format before zip files too: there torch checks lengths and records with assert."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 11):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"x\.pth"):
            read_file(str(path))
    for i in range(0, len(whole), 5 if is_zip else 1):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        with contextlib.suppress(CheckpointError):
            read_file(str(path))


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2"])
def test_an_exported_graph_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(CheckpointError, match=r"is an exported graph.*Give the weights it was exported from"):
        read_file(str(tmp_path / name))


@pytest.mark.parametrize(("content", "level"), [({"w": torch.zeros(1)}, "INFO"), ({"trainer": {}}, "WARNING")])
def test_a_checkpoint_of_a_run_without_a_digest_is_warned_of(
    tmp_path: Path, content: dict[str, Any], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    torch.save(content, tmp_path / f"{level}.pth")
    read_file(str(tmp_path / f"{level}.pth"))
    assert [r.levelname for r in caplog.records if "carries no digest" in r.message] == [level]


def test_a_pickle_that_torch_did_not_write_is_refused_without_torchs_warning(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": 1}, protocol=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError):
            read_file(str(tmp_path / "a.pth"))
