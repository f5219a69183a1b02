"""config.json as it may be: written by hand, of another library, damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.convert import write_content
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.hugging_face import HuggingFace
from tests.checkpoint.models import SMALL, random_weights


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", "28"),
        ("image_size", [28]),
        ("image_size", {}),
        ("image_size", 0),
        ("patch_size", 0),
        ("patch_size", None),
        ("patch_size", "7"),
        ("num_attention_heads", "4"),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("num_attention_heads", -1),
        ("num_attention_heads", [1]),
    ],
)
def test_a_value_that_cannot_be_names_itself(key: str, value: Any, tmp_path: Path) -> None:
    write_content(HuggingFace().write(random_weights())[0], str(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=r"hf.*(image_size|patch_size|attention heads)"):
        read_weights(str(tmp_path / "hf"))


def test_the_older_weight_file_finds_its_config(tmp_path: Path) -> None:
    write_content(HuggingFace().write(random_weights())[0], str(tmp_path / "hf"))
    torch.save(load_file(tmp_path / "hf" / "model.safetensors"), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert read_weights(str(tmp_path / "hf" / "pytorch_model.bin")).spec.num_heads == SMALL.num_heads


def test_a_config_without_heads_leaves_them_to_the_user(tmp_path: Path) -> None:
    write_content(HuggingFace().write(random_weights())[0], str(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["num_attention_heads"]
    for without in (config | {"num_attention_heads": None}, config):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(without))
        with pytest.raises(CheckpointError, match=r"does not state its attention heads.*--num-heads"):
            read_weights(str(tmp_path / "hf"))
    assert read_weights(str(tmp_path / "hf"), hints=Hints(num_heads=2)).spec.num_heads == 2
