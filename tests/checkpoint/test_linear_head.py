from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.checkpoint import CheckpointError
from dinoengine.checkpoint.classifier import convert_to_classifier
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.heads import HeadShape
from dinoengine.checkpoint.linear_head import export_linear_head, read_linear_head
from tests.checkpoint.models import SMALL, random_weights


def _head(width: int, classes: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randn(classes, width, generator=generator),
        "bias": torch.randn(classes, generator=generator),
    }


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weight": torch.zeros(3, 4)}, r"is no linear head, which has 'weight' and 'bias' alone; it has weight"),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "x": torch.zeros(1)}, "alone; it has weight, bias, x"),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(4)}, r"weight \[3, 4\] and bias \[4\] are not"),
        ({"weight": torch.zeros(3), "bias": torch.zeros(3)}, r"weight \[3\] and bias \[3\] are not"),
        ({"model": {}}, "it has model"),
    ],
)
def test_what_is_no_head_is_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=message):
        read_linear_head(str(tmp_path / "head.pth"))


@pytest.mark.parametrize("times", [2, 5])
def test_meta_heads_go_in_and_out_to_the_bit(times: int, tmp_path: Path) -> None:
    backbone = random_weights(SMALL)
    if times == 5:
        backbone = random_weights(replace(SMALL, depth=4))
    save_weights(backbone, str(tmp_path / "backbone.pth"), "meta")
    torch.save(_head(times * 64), tmp_path / "head.pth")
    convert_to_classifier(
        str(tmp_path / "backbone.pth"), str(tmp_path / "cls.pth"), linear_head=str(tmp_path / "head.pth")
    )
    shape = export_linear_head(str(tmp_path / "cls.pth"), str(tmp_path / "again.pth"))
    assert shape == HeadShape(6, *((1, True) if times == 2 else (4, True)))
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again) == ["weight", "bias"]
    assert all(torch.equal(again[name], value) for name, value in _head(times * 64).items())


def test_export_refuses_what_has_no_head_and_what_is_there(tmp_path: Path) -> None:
    save_weights(random_weights(), str(tmp_path / "backbone.pth"), "meta")
    with pytest.raises(CheckpointError, match=r"layout meta.* has no linear head; it has backbone"):
        export_linear_head(str(tmp_path / "backbone.pth"), str(tmp_path / "head.pth"))
    (tmp_path / "head.pth").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export_linear_head(str(tmp_path / "backbone.pth"), str(tmp_path / "head.pth"))
    assert (tmp_path / "head.pth").read_text() == "mine"
