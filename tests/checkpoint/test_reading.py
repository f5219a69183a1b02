"""What a path may be: a file, a folder of shares, a folder as Hugging Face writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinoengine.checkpoint import CheckpointError, read_checkpoint
from dinoengine.checkpoint.reading import read_content


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


def test_a_config_beside_a_weight_file_of_any_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    for name in ("pytorch_model.bin", "x.pth"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        assert read_content(str(tmp_path / name)).config == {"hidden_size": 3}


def test_a_folder_of_shares_that_was_not_finished_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "model_0000009.dcp").mkdir()
    for path in (tmp_path / "model_0000009.dcp", f"{tmp_path}/model_0000009.dcp/"):
        for read in (read_content, read_checkpoint):
            with pytest.raises(CheckpointError, match="was not written to its end"):
                read(str(path))
