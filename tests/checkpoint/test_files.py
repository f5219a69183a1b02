"""Files of any origin are data: read, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.files import grouped_names, read_content, short_list


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


def test_pickled_code_is_refused_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": _Bomb(str(tmp_path / "owned"))}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth was refused(?s:.)*could run code(?s:.)*save its tensors alone"):
        read_content(str(tmp_path / "x.pth"))
    assert not (tmp_path / "owned").exists()
    with pytest.raises(CheckpointError, match=r"\(found: posix\.mkdir\)$"):
        read_content(str(tmp_path / "x.pth"))


def test_a_folder_needs_its_weight_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors \(it has config\.json\)"):
        read_content(str(tmp_path))


def test_safetensors_with_and_without_a_config(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_content(str(tmp_path)).config is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        content = read_content(str(path))
        assert content.config == {"hidden_size": 3}
        assert torch.equal(content.data["a"], torch.ones(2))


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is no JSON|holds a list)"):
        read_content(str(tmp_path))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_every_truncation_and_garbage_is_one_clear_error(name: str, tmp_path: Path) -> None:
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
            read_content(str(path))


def test_a_missing_file_is_no_checkpoint_error(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            read_content(str(tmp_path / name))


def test_names_in_messages() -> None:
    assert grouped_names(["a.b.x", "a.b.y", "c", "d"]) == ["c", "d", "a.b.{x, y}"]
    assert short_list([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 ... and 2 more"


def test_a_config_beside_a_weight_file_of_any_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    for name in ("pytorch_model.bin", "x.pth"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        assert read_content(str(tmp_path / name)).config == {"hidden_size": 3}


@pytest.mark.parametrize("is_zip", [True, False])
def test_every_flipped_bit_is_read_or_refused(is_zip: bool, tmp_path: Path) -> None:
    """The format before zip files too: there torch checks lengths and records with assert."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 11):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"x\.pth"):
            read_content(str(path))
    for i in range(0, len(whole), 5 if is_zip else 1):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        with contextlib.suppress(CheckpointError):
            read_content(str(path))


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2"])
def test_an_exported_graph_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(CheckpointError, match=r"is an exported graph.*Give the weights it was exported from"):
        read_content(str(tmp_path / name))
