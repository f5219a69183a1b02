"""Saving, loading, resuming, refusing."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from dinoengine.checkpoint.digest import content_digest
from dinoengine.checkpoint.files import UnreadableCheckpointError


def _model(value: float = 1.0, width: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


class Box:
    """A checkpointable that holds one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _state(model: nn.Module) -> list[float]:
    return [v.double().sum().item() for v in model.state_dict().values()]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = Checkpointer(_model(3.0), str(tmp_path), trainer=Box([1, "a"]), metadata={"config": "X: 1"}).save(
        "model_0000004", iteration=4
    )
    other, box = _model(), Box(None)
    rest = Checkpointer(other, str(tmp_path), trainer=box).load(path)
    assert _state(other) == _state(_model(3.0))
    assert box.value == [1, "a"]
    assert rest == {"config": "X: 1", "iteration": 4}


def test_resume_prefers_the_last_checkpoint_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dinoengine")
    weights = Checkpointer(_model(5.0), str(tmp_path / "other")).save("w", iteration=99)
    run = Checkpointer(_model(2.0), str(tmp_path / "run"), trainer=Box(7))
    run.save("model_0000009", iteration=9)

    model, box = _model(), Box(0)
    start = Checkpointer(model, str(tmp_path / "run"), trainer=box).resume_or_load(weights, resume=True)
    assert (start, box.value, _state(model)) == (10, 7, _state(_model(2.0)))
    assert "Resuming from" in caplog.text
    assert f"MODEL.WEIGHTS {weights} is not used" in caplog.text


def test_weights_give_iteration_0_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dinoengine")
    weights = Checkpointer(_model(5.0), str(tmp_path), trainer=Box(7)).save("w", iteration=99)
    model, box = _model(), Box(0)
    start = Checkpointer(model, str(tmp_path / "new"), trainer=box).resume_or_load(weights, resume=True)
    assert (start, box.value, _state(model)) == (0, 0, _state(_model(5.0)))
    assert "Starting at iteration 0 with the weights of" in caplog.text
    assert "--resume found no checkpoint" in caplog.text


def test_from_scratch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dinoengine")
    assert Checkpointer(_model(), str(tmp_path)).resume_or_load("", resume=False) == 0
    assert "Starting from scratch at iteration 0" in caplog.text


def test_without_resume_the_folder_is_not_looked_at(tmp_path: Path) -> None:
    Checkpointer(_model(2.0), str(tmp_path)).save("model_0000009", iteration=9)
    model = _model()
    assert Checkpointer(model, str(tmp_path)).resume_or_load("", resume=False) == 0
    assert _state(model) == _state(_model())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist. Check the path"):
        Checkpointer(_model(), str(tmp_path)).resume_or_load("nowhere.pth", resume=False)


def test_another_shape_is_refused_with_both_shapes_and_nothing_changes(tmp_path: Path) -> None:
    path = Checkpointer(_model(5.0, width=4), str(tmp_path)).save("w")
    model = _model()
    with pytest.raises(CheckpointError, match=r"1 of another shape: 0\.weight \[3, 4\] \(model: \[3, 2\]\)"):
        Checkpointer(model, str(tmp_path)).load(path, weights_only=True)
    assert _state(model) == _state(_model())


def test_missing_and_unexpected_keys_are_grouped_and_named(tmp_path: Path) -> None:
    path = Checkpointer(nn.Sequential(nn.Linear(2, 3), nn.Identity(), nn.Linear(1, 1)), str(tmp_path)).save("w")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(_model(), str(tmp_path)).load(path, weights_only=True)
    assert "2 of 7 entries fit" in str(error.value)
    assert "5 missing: 1.{weight, bias, running_mean, running_var, num_batches_tracked}" in str(error.value)
    assert "2 not in the model: 2.{weight, bias}" in str(error.value)
    assert "MODEL.WEIGHTS_STRICT False" in str(error.value)


def test_not_strict_loads_what_fits_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Checkpointer(nn.Sequential(_model(5.0)[0]), str(tmp_path)).save("w")
    model = _model()
    Checkpointer(model, str(tmp_path), strict=False).load(path, weights_only=True)
    assert model[0].weight[0, 0] == 5.0  # type: ignore[index]
    assert model[1].weight[0] == 1.0  # type: ignore[index]
    assert "Loading what fits" in caplog.text


def test_not_strict_still_refuses_when_nothing_fits(tmp_path: Path) -> None:
    path = Checkpointer(nn.ModuleDict({"x": nn.Linear(2, 3)}), str(tmp_path)).save("w")
    with pytest.raises(CheckpointError, match="0 of 7 entries fit"):
        Checkpointer(_model(), str(tmp_path), strict=False).load(path, weights_only=True)


def test_resuming_is_strict_even_where_weights_are_not(tmp_path: Path) -> None:
    Checkpointer(nn.Sequential(_model(5.0)[0]), str(tmp_path), trainer=Box(1)).save("model_0000000", iteration=0)
    with pytest.raises(CheckpointError, match="5 missing"):
        Checkpointer(_model(), str(tmp_path), strict=False, trainer=Box(0)).resume_or_load("", resume=True)


def test_missing_state_of_a_checkpointable_is_named(tmp_path: Path) -> None:
    Checkpointer(_model(5.0), str(tmp_path)).save("model_0000000", iteration=0)
    model = _model()
    with pytest.raises(CheckpointError, match="lacks the state of trainer"):
        Checkpointer(model, str(tmp_path), trainer=Box(0)).resume_or_load("", resume=True)
    assert _state(model) == _state(_model())


class _Code:
    def __reduce__(self) -> Any:
        return print, ("this code ran",)


def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": _Code()}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": _Code()}))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="Only tensors and plain values are read"):
            read_checkpoint(str(tmp_path / name))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = Path(Checkpointer(_model(), str(tmp_path)).save("w"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        read_checkpoint(str(path))


@pytest.mark.parametrize(("content", "words"), [([1], "holds a list"), ({"a": 1}, "no 'model' entry; it has a")])
def test_other_content_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=words):
        Checkpointer(_model(), str(tmp_path)).load(str(tmp_path / "w.pth"), weights_only=True)


def test_a_crash_while_saving_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(_model(2.0), str(tmp_path))
    checkpointer.save("model_final", iteration=1)

    def dies_midway(data: Any, file: Any) -> None:
        file.write(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies_midway)
        with pytest.raises(OSError, match="no space left"):
            checkpointer.save("model_final", iteration=2)
    model = _model()
    assert Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True) == 2
    assert _state(model) == _state(_model(2.0))
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


def test_a_flipped_byte_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """Padding and archive bookkeeping hold no content; a flip there may pass, with the content unharmed."""
    path = Path(Checkpointer(_model(3.0), str(tmp_path), trainer=Box([1, "a"])).save("w", iteration=4))
    good = path.read_bytes()
    wanted = content_digest(read_checkpoint(str(path)))
    num_noticed = 0
    for position in range(0, len(good), 11):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            data = read_checkpoint(str(path))
        except UnreadableCheckpointError:
            num_noticed += 1
        else:
            data = {key: value for key, value in data.items() if value != wanted}  # the name "digest" was hit
            assert content_digest(data) == wanted, position
    assert num_noticed > 100


def test_a_changed_weight_is_refused_and_the_model_is_unchanged(tmp_path: Path) -> None:
    """The case that only the digest notices: one bit of one weight."""
    path = Path(Checkpointer(_model(3.0), str(tmp_path)).save("w"))
    content, weight = path.read_bytes(), struct.pack("<6f", *[3.0] * 6)
    assert content.count(weight) == 1
    path.write_bytes(content.replace(weight, weight[:-1] + b"\x41"))
    model = _model()
    for load in (
        lambda: Checkpointer(model, "").load(str(path)),
        lambda: Checkpointer(model, "").load_weights(str(path)),
    ):
        with pytest.raises(
            UnreadableCheckpointError, match=r"w\.pth is damaged: its content .* Use another copy of it"
        ):
            load()
    assert _state(model) == _state(_model())


def test_a_file_without_digest_loads_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dinoengine")
    torch.save({"model": _model(3.0).state_dict(), "iteration": 4}, tmp_path / "old.pth")
    model = _model()
    assert Checkpointer(model, "").load(str(tmp_path / "old.pth")) == {"iteration": 4}
    assert _state(model) == _state(_model(3.0))
    assert "old.pth carries no digest" in caplog.text
