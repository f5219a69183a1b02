"""Folders of shares: what is written is read, and nothing that was cut short or changed is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinoengine.checkpoint import Checkpointer, CheckpointWriteError, read_checkpoint
from dinoengine.checkpoint import sharded as sharded_module
from dinoengine.checkpoint.files import UnreadableCheckpointError
from dinoengine.checkpoint.sharded import (
    MANIFEST,
    is_sharded_checkpoint,
    mesh_of,
    placed_like,
    read_sharded,
    remove_checkpoint,
    remove_unfinished,
    rename_checkpoint,
    write_sharded,
)


@pytest.fixture(scope="module", autouse=True)
def _a_group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sharded tensors need a process group; one process is enough for what is tested here."""
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _shared(tensor: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def _model(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    for name in ("weight", "bias"):
        setattr(model, name, nn.Parameter(_shared(torch.full_like(getattr(model, name), value))))
    return model


def _data(value: float) -> dict[str, Any]:
    return {
        "model": {"w": _shared(torch.full((5, 2), value)), "center": torch.full((3,), value)},
        "trainer": {"state": {0: {"exp_avg": _shared(torch.full((5,), value)), "step": torch.tensor(value)}}, "n": [1]},
        "iteration": int(value),
    }


def test_what_is_written_is_read_whole_or_shared(tmp_path: Path) -> None:
    path = str(tmp_path / "model_0000007.dcp")
    write_sharded(path, _data(7.0))
    whole = read_checkpoint(path)
    assert torch.equal(whole["model"]["w"], torch.full((5, 2), 7.0))
    assert torch.equal(whole["model"]["center"], torch.full((3,), 7.0))
    assert whole["trainer"]["n"] == [1]
    assert whole["iteration"] == 7
    mesh = mesh_of(_model(0.0))
    shared = read_sharded(path, mesh)
    moment = shared["trainer"]["state"][0]["exp_avg"]
    assert moment.device_mesh == mesh
    assert torch.equal(moment.full_tensor(), torch.full((5,), 7.0))
    assert shared["trainer"]["state"][0]["step"].item() == 7.0


@pytest.mark.parametrize("stage", ["save", "_flushed", "write_file", "write_json", "_remove_others"])
def test_a_write_that_ends_anywhere_leaves_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = str(tmp_path / "model_best.dcp")
    write_sharded(path, _data(1.0))

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    where = torch.distributed.checkpoint if stage == "save" else sharded_module
    monkeypatch.setattr(where, stage, fail)
    with pytest.raises(OSError, match="No space"):
        write_sharded(path, _data(2.0))
    monkeypatch.undo()
    if stage == "_remove_others":  # the new one is complete, and named
        assert read_checkpoint(path)["iteration"] == 2
        return
    assert read_checkpoint(path)["iteration"] == 1
    assert sorted(os.listdir(path)) == [MANIFEST, _shards(path)]


def _shards(path: str) -> str:
    return str(json.loads(Path(path, MANIFEST).read_text())["shards"])


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    good = str(tmp_path / "model_0000001.dcp")
    write_sharded(good, _data(1.0))
    os.makedirs(os.path.join(good, "shards_dead0000"))
    os.makedirs(tmp_path / "model_0000002.dcp" / "shards_dead0001")
    assert remove_unfinished(str(tmp_path)) == ["model_0000001.dcp/shards_dead0000", "model_0000002.dcp"]
    assert read_checkpoint(good)["iteration"] == 1
    remove_checkpoint(good)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": 1, "files": {}}'])
def test_a_damaged_manifest_is_left_for_its_reader(tmp_path: Path, content: str) -> None:
    """Cleaning up before a resume must neither stop at it nor remove shares of which it cannot be said whose they are."""
    for iteration in (1, 2):
        write_sharded(str(tmp_path / f"model_000000{iteration}.dcp"), _data(float(iteration)))
        os.makedirs(tmp_path / f"model_000000{iteration}.dcp" / "shards_dead0000")
    (tmp_path / "model_0000001.dcp" / MANIFEST).write_text(content)
    before = sorted(os.listdir(tmp_path / "model_0000001.dcp"))
    assert remove_unfinished(str(tmp_path)) == ["model_0000002.dcp/shards_dead0000"]
    assert sorted(os.listdir(tmp_path / "model_0000001.dcp")) == before
    with pytest.raises(UnreadableCheckpointError, match=f"damaged: its {MANIFEST} is not what was written"):
        read_sharded(str(tmp_path / "model_0000001.dcp"))


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_folder_of_shares_takes_the_name_of_another(tmp_path: Path, is_finished: bool) -> None:
    """As damaged checkpoints are put aside, the second time as well; ``os.replace`` refuses a folder that holds files."""
    old, new = str(tmp_path / "damaged_0000001.dcp"), str(tmp_path / "model_0000001.dcp")
    write_sharded(old, _data(1.0))
    if not is_finished:
        os.remove(os.path.join(old, MANIFEST))
    write_sharded(new, _data(2.0))
    rename_checkpoint(new, old)
    assert os.listdir(tmp_path) == ["damaged_0000001.dcp"]
    assert read_checkpoint(old)["iteration"] == 2


def _flip_the_name_of_the_shares(path: Path) -> None:
    text, shards = (path / MANIFEST).read_text(), _shards(str(path))
    (path / MANIFEST).write_text(text.replace(shards, shards[:-1] + chr(ord(shards[-1]) ^ 1)))


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_cleaning_up_leaves_the_shares_of_a_manifest_that_names_others(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model_0000003.dcp"
    write_sharded(str(path), _data(3.0))
    shards = _shards(str(path))
    if damage == "flip":
        _flip_the_name_of_the_shares(path)
    else:  # complete, and not there: whatever lies beside it may be what is left
        (path / shards).rename(path / "shards_0000dead")
    assert remove_unfinished(str(tmp_path)) == []
    assert (path / (shards if damage == "flip" else "shards_0000dead")).is_dir()


def test_a_folder_that_was_finished_once_is_not_taken_for_one_that_was_not(tmp_path: Path) -> None:
    path = tmp_path / "model_0000003.dcp"
    write_sharded(str(path), _data(3.0))
    (path / MANIFEST).unlink()
    assert remove_unfinished(str(tmp_path), last=path.name) == []
    assert remove_unfinished(str(tmp_path)) == [path.name]


def test_a_manifest_without_a_digest_is_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "model_0000003.dcp"
    write_sharded(str(path), _data(3.0))
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["digest"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UnreadableCheckpointError, match="not what was written"):
        read_sharded(str(path))
    (path / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))
    assert read_sharded(str(path))["iteration"] == 3


def test_all_that_a_checkpoint_is_made_of_is_flushed_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares and their names before the manifest that names them, the manifest before the pointer."""
    flushed: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    path = tmp_path / "model_0000003.dcp"
    write_sharded(str(path), _data(3.0))
    shards = path / _shards(str(path))
    names = [os.path.relpath(name, tmp_path) for name in flushed]
    manifest = next(i for i, name in enumerate(names) if MANIFEST in name)
    for file in shards.iterdir():
        assert os.path.relpath(file, tmp_path) in names[:manifest]
    assert os.path.relpath(shards, tmp_path) in names[:manifest]
    assert names[-1] == "."


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "no manifest", "a list", "leads out", "is out"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model_0000003.dcp"
    write_sharded(str(path), _data(3.0))
    file = next((path / _shards(str(path))).glob("*.safetensors"))
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        (path / MANIFEST).unlink()
    else:
        manifest = {**json.loads((path / MANIFEST).read_text()), "version": 1}  # without a digest of its own
        manifest["shards"] = {"leads out": "../elsewhere", "is out": ".."}.get(damage, manifest["shards"])
        manifest["files"] = list(manifest["files"]) if damage == "a list" else manifest["files"]
        (path / MANIFEST).write_text("{" if damage == "manifest" else json.dumps(manifest))
    assert is_sharded_checkpoint(str(path)) == (damage != "no manifest")
    for mesh in (None, mesh_of(_model(0.0))):
        with pytest.raises(UnreadableCheckpointError, match="damaged|not there|not written to its end"):
            read_sharded(str(path), mesh)


@pytest.mark.parametrize("lost", ["folder", "manifest"])
def test_a_last_checkpoint_of_which_something_is_gone_is_passed_over(tmp_path: Path, lost: str) -> None:
    writer = Checkpointer(_model(1.0), str(tmp_path))
    writer.save("model_0000000", iteration=0)
    last = Path(writer.save("model_0000001", iteration=1))
    if lost == "folder":
        last.rename(tmp_path / "elsewhere")
    else:
        (last / MANIFEST).unlink()
    reader = Checkpointer(_model(0.0), str(tmp_path))
    assert reader.resume_or_load("") == 1
    assert reader.last_checkpoint_name() == "model_0000000.dcp"
    assert (tmp_path / "damaged_0000001.dcp").is_dir() == (lost == "manifest")  # its shares are there to be looked at


def test_a_checkpointer_falls_back_and_changes_between_whole_and_shared(tmp_path: Path) -> None:
    folder = str(tmp_path)
    writer = Checkpointer(_model(1.0), folder)
    first = writer.save("model_0000000", iteration=0)
    assert first.endswith("model_0000000.dcp")
    writer.model = _model(2.0)
    second = Path(writer.save("model_0000001", iteration=1))
    assert writer.last_checkpoint_name() == "model_0000001.dcp"
    file = next((second / _shards(str(second))).glob("*.safetensors"))
    file.write_bytes(b"damaged")

    reader = Checkpointer(_model(0.0), folder)
    assert reader.resume_or_load("") == 1
    assert torch.equal(reader.model.weight.full_tensor(), torch.ones(2, 3))  # type: ignore[operator, union-attr]
    assert sorted(os.listdir(folder)) == ["damaged_0000001.dcp", "last_checkpoint", "model_0000000.dcp"]

    whole = Checkpointer(nn.Linear(3, 2), folder)
    assert whole.resume_or_load("") == 1
    assert torch.equal(whole.model.weight, torch.ones(2, 3))  # type: ignore[arg-type]
    whole.save("model_0000005", iteration=5)
    again = Checkpointer(_model(0.0), folder)
    assert again.resume_or_load("") == 6
    assert torch.equal(again.model.bias.full_tensor(), torch.ones(2))  # type: ignore[operator, union-attr]


def test_one_of_a_name_is_left_when_a_run_is_no_longer_sharded(tmp_path: Path) -> None:
    """model_final and model_best are written again: the older of the other kind would be taken for the result."""
    shared, whole = Checkpointer(_model(1.0), str(tmp_path)), Checkpointer(nn.Linear(3, 2), str(tmp_path))
    shared.save("model_0000007", iteration=7)
    for checkpointer, left in ((shared, "model_final.dcp"), (whole, "model_final.pth"), (shared, "model_final.dcp")):
        checkpointer.save("model_final", iteration=8)
        assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000007.dcp", left]
        assert checkpointer.last_checkpoint_name() == left


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(_model(1.0), str(tmp_path))
    checkpointer.save("model_0000000", iteration=0)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded_module, "write_json", fail)
    with pytest.raises(
        CheckpointWriteError, match=r"No space left on device(?s:.)*last good checkpoint is model_0000000.dcp"
    ):
        checkpointer.save("model_0000001", iteration=1)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000000.dcp", "model_0000001.dcp"]
    assert Checkpointer(_model(0.0), str(tmp_path)).resume_or_load("") == 1
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000000.dcp"]


def test_tensors_are_placed_as_others_are() -> None:
    whole, shared = torch.arange(4.0), _shared(torch.zeros(4))
    assert placed_like(whole, whole) is whole
    assert torch.equal(placed_like(whole, shared).full_tensor(), whole)  # type: ignore[attr-defined]
    assert torch.equal(placed_like(placed_like(whole, shared), whole), whole)
