"""The geometry of resized position tables, and that nothing but the one entry changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dinoengine.checkpoint.resize_steps import with_channels, with_patch_size, with_registers, with_table_grid
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from tests.checkpoint.models import SMALL, WITH_REGISTERS, random_entries, random_weights


def _coordinate_table(grid: tuple[int, int], width: int) -> torch.Tensor:
    """[1, 1 + N, D]: CLS is -7 in every channel, patches hold (row, column, row, column ...)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    patches = torch.stack((rows, columns), dim=-1).reshape(-1, 2).float().repeat(1, width // 2)
    return torch.cat((torch.full((1, width), -7.0), patches)).unsqueeze(0)


def _only_change(old: Weights, new: Weights) -> list[str]:
    return [
        f"{part}.{name}"
        for part in new.parts
        for name, value in new.parts[part].items()
        if value is not old.parts[part].get(name)
    ]


@pytest.mark.parametrize("spec", [SMALL, WITH_REGISTERS], ids=["offset", "antialias"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((8, 8), (16, 16)),
        ((8, 8), (5, 5)),
        ((8, 8), (6, 12)),
        ((6, 10), (12, 20)),
        ((6, 10), (5, 7)),
        ((6, 10), (8, 8)),
    ],
)
def test_coordinates_stay_coordinates(spec: BackboneSpec, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Cell i of n lies at (i + 0.5) / n of the edge. A table shifted by the CLS row would be off by a whole column."""
    weights = random_weights(replace(spec, table_grid=old))
    table = _coordinate_table(old, spec.embed_dim)
    weights.backbone["pos_embed"] = table
    resized = with_table_grid(weights, new)
    got = resized.backbone["pos_embed"]
    assert torch.equal(got[:, 0], table[:, 0])
    cells = got[0, 1:].reshape(*new, -1)
    torch.testing.assert_close(cells[:, :, 0], cells[:, :1, 0].expand(new), rtol=0, atol=1e-4)  # rows know no column
    torch.testing.assert_close(cells[:, :, 1], cells[:1, :, 1].expand(new), rtol=0, atol=1e-4)
    for axis, channel in ((0, 0), (1, 1)):
        line = cells[:, 0, channel] if axis == 0 else cells[0, :, channel]
        expected = (torch.arange(new[axis]) + 0.5) * old[axis] / new[axis] - 0.5
        inside = (expected >= 1.5) & (expected <= old[axis] - 2.5)  # bicubic bends at the border
        assert (line - expected)[inside].abs().max() < 0.15
        assert (line - expected).abs().max() < 0.2
        assert (line.diff() > 0).all()
    assert resized.spec == replace(weights.spec, table_grid=new)
    assert _only_change(weights, resized) == ["backbone.pos_embed"]


def test_a_table_goes_up_and_comes_back() -> None:
    weights = random_weights(replace(WITH_REGISTERS, table_grid=(6, 10)))
    weights.backbone["pos_embed"] = _coordinate_table((6, 10), 64)
    back = with_table_grid(with_table_grid(weights, (12, 20)), (6, 10))
    torch.testing.assert_close(back.backbone["pos_embed"], weights.backbone["pos_embed"], rtol=0, atol=0.25)


def test_student_and_teacher_change_alike_and_heads_stay() -> None:
    weights = random_weights(heads=True)
    weights.parts["student.backbone"] = random_entries(SMALL.build(), seed=5)
    weights.parts["centers"] = {"dino": torch.zeros(1, 12)}
    for changed, entry in (
        (with_table_grid(weights, (2, 3)), "pos_embed"),
        (with_patch_size(weights, 9), "patch_embed.proj.weight"),
        (with_channels(weights, 1), "patch_embed.proj.weight"),
        (with_registers(weights, 2), "register_tokens"),
    ):
        assert _only_change(weights, changed) == [f"backbone.{entry}", f"student.backbone.{entry}"]
        teacher, student = (changed.parts[part][entry] for part in ("backbone", "student.backbone"))
        assert teacher.shape == student.shape == changed.spec.build("meta").state_dict()[entry].shape
        assert torch.equal(teacher, student) == (entry == "register_tokens")


def test_registers_are_added_behind_those_there_are() -> None:
    weights = random_weights(WITH_REGISTERS)
    tokens = with_registers(weights, 6).backbone["register_tokens"]
    assert torch.equal(tokens[:, :4], weights.backbone["register_tokens"])
    assert 0 < tokens[:, 4:].abs().max() < 1e-5
    assert torch.equal(tokens, with_registers(weights, 6).backbone["register_tokens"])
