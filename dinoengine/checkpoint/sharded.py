"""Checkpoints of sharded models: a folder to which every process writes its own share.

    model_0000999.dcp/
        manifest.json              names the folder of shares, with size and SHA-256 of each file in it; has its own
        shards_1a2b3c4d/
            *.safetensors          the sharded tensors, written by torch.distributed.checkpoint
            rest.pth               all else, with places for those tensors: an ordinary checkpoint file with its digest

The manifest is written last, whole or not at all: without it the folder is no checkpoint, and a folder that is written
again stays what it was until the new manifest names the new shares. Nothing in it is run when it is read: safetensors and
``weights_only``. Any number of processes reads it, each its share; one that has the whole model reads it whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinoengine.checkpoint.files import CheckpointError, UnreadableCheckpointError, read_file
from dinoengine.checkpoint.writing import write_file
from dinoengine.utils import comm
from dinoengine.utils.file_writing import sync_folder, write_json

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SUFFIX = ".dcp"
MANIFEST = "manifest.json"
_VERSION = 2  # version 1 had no digest of its own
_SHARDS = re.compile(r"shards_[0-9a-f]{8}")
_REST = "rest.pth"
_PLACE = "<sharded tensor>"
_CHUNK = 2**24


def is_sharded_checkpoint(path: str) -> bool:
    """Whether ``path`` is a folder of shares that was written to its end."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def is_checkpoint(path: str) -> bool:
    """Whether ``path`` is a file, or a folder of shares that was written to its end; their content is not looked at."""
    return os.path.isfile(path) or is_sharded_checkpoint(path)


def mesh_of(model: torch.nn.Module) -> DeviceMesh | None:
    """The processes that share ``model``; None where each has the whole."""
    return next((p.device_mesh for p in model.parameters() if is_shared(p)), None)  # type: ignore[attr-defined]


def is_shared(tensor: Any) -> bool:
    """Whether this process holds a part of ``tensor`` (a DTensor)."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, whole or shared, as ``like`` is; of a shared one that is to be whole a collective operation."""
    if is_shared(value) == is_shared(like):
        return value
    if is_shared(value):
        return value.full_tensor()  # type: ignore[attr-defined]
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def write_sharded(path: str, data: dict[str, Any]) -> None:
    """Write the folder ``path``, or write it again; a collective operation. What is not sharded is that of rank 0.

    Raises:
        OSError: on all processes, if one of them cannot write; a checkpoint that was there is as it was.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    shards = comm.broadcast_object(f"shards_{secrets.token_hex(4)}")
    folder = os.path.join(path, shards)
    tensors: dict[str, Tensor] = {}
    rest = _without_shared(data, "", tensors)
    try:
        comm.on_main_process(lambda: os.makedirs(folder))
        try:
            save(tensors, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
        except CheckpointException as error:  # no Exception: it would end a run without a word
            raise next(iter(error.failures.values()))[0] from None
        names = comm.on_main_process(lambda: sorted(os.listdir(folder)))
        parts = comm.gather_results(lambda: {n: _flushed(os.path.join(folder, n)) for n in _my_part(names)})
        files = {name: entry for part in parts for name, entry in part.items()}
        comm.on_main_process(lambda: _commit(path, shards, files, rest))
    except BaseException:
        if comm.is_main_process() and not _names(path, shards):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _commit(path: str, shards: str, files: dict[str, Any], rest: dict[str, Any]) -> None:
    folder = os.path.join(path, shards)
    write_file(os.path.join(folder, _REST), {"content": rest})
    files = {**files, _REST: _flushed(os.path.join(folder, _REST))}
    sync_folder(folder)
    manifest = {"version": _VERSION, "shards": shards, "files": files}
    write_json(os.path.join(path, MANIFEST), {**manifest, "digest": _digest_of(manifest)})
    sync_folder(os.path.dirname(os.path.abspath(path)))
    _remove_others(path, shards)


def read_sharded(path: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The content of a checkpoint; every file of it is compared with the manifest first.

    Args:
        mesh: processes that share the model: each gets its share, as DTensors, and checks some of the files, so it is
            a collective operation. None: whole tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such folder.
        UnreadableCheckpointError: if it is damaged or was not written to its end.
        Both with ``mesh`` on all processes.
    """
    problem, is_gone = "", not os.path.isdir(path)
    try:
        manifest = _manifest(path)
        folder = os.path.join(path, manifest["shards"])
        names = sorted(manifest["files"])
        for name in _my_part(names) if mesh is not None else names:
            _compare(os.path.join(folder, name), manifest["files"][name])
    except (CheckpointError, OSError) as error:
        problem = str(error)
    seen = comm.all_gather((problem, is_gone)) if mesh is not None else [(problem, is_gone)]
    if any(is_gone for _, is_gone in seen):
        raise FileNotFoundError(f"Checkpoint {path} does not exist.")
    if problems := [text for text, _ in seen if text]:
        raise UnreadableCheckpointError(problems[0])
    content: dict[str, Any] = read_file(os.path.join(folder, _REST))["content"]
    return _with_tensors(content, _load(folder, mesh))


def _load(folder: str, mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """All tensors of a folder of shares, each process for itself."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import empty as empty_shared

    tensors: dict[str, Tensor] = {}
    for name, entry in HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata.items():
        size, dtype = entry.size, entry.properties.dtype  # type: ignore[union-attr]
        if mesh is None:
            tensors[name] = torch.empty(size, dtype=dtype)
        else:
            placements = [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(0)]  # the last dimension splits a copy
            tensors[name] = empty_shared(size, dtype=dtype, device_mesh=mesh, placements=placements)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it need not be enabled
        load(tensors, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
    return tensors


def remove_checkpoint(path: str) -> None:
    """Delete a checkpoint, a file or a folder; the manifest first, without which the rest is none.

    Raises:
        OSError: if it cannot be deleted.
    """
    if os.path.isdir(path):
        os.remove(os.path.join(path, MANIFEST))
        shutil.rmtree(path)
    else:
        os.remove(path)


def remove_unfinished(save_dir: str, last: str = "") -> list[str]:
    """Remove what killed processes have left of ``write_sharded`` and ``remove_checkpoint``; returns the names.

    Args:
        last: name of a checkpoint that was written to its end once (``last_checkpoint`` names it): it is kept, in whatever
            state it is.
    """
    removed = []
    for name in sorted(os.listdir(save_dir)):
        path = os.path.join(save_dir, name)
        if not name.endswith(SUFFIX) or not os.path.isdir(path):
            continue
        if is_sharded_checkpoint(path):
            with contextlib.suppress(UnreadableCheckpointError):  # a damaged one is for who reads it to speak of
                manifest = _manifest(path)
                if all(os.path.isfile(os.path.join(path, manifest["shards"], file)) for file in manifest["files"]):
                    removed += [f"{name}/{other}" for other in _remove_others(path, manifest["shards"])]
        elif name != last:
            shutil.rmtree(path)
            removed.append(name)
    return removed


def rename_checkpoint(path: str, new_path: str) -> None:
    """Give a file, or a folder of shards, another name, in the place of what has that name."""
    if os.path.isdir(new_path) and os.path.isdir(path):
        remove_checkpoint(new_path) if is_sharded_checkpoint(new_path) else shutil.rmtree(new_path)
    os.replace(path, new_path)


def _remove_others(path: str, shards: str) -> list[str]:
    others = [name for name in sorted(os.listdir(path)) if name.startswith("shards_") and name != shards]
    for name in others:
        shutil.rmtree(os.path.join(path, name), ignore_errors=True)
    return others


def _manifest(path: str) -> dict[str, Any]:
    try:
        with open(os.path.join(path, MANIFEST), encoding="utf-8") as file:
            manifest: dict[str, Any] = json.load(file)
        files, digest = manifest["files"], manifest.pop("digest", "")
        is_whole = digest == _digest_of(manifest) if manifest["version"] == _VERSION else manifest["version"] == 1
        # A name alone: a manifest must not lead out of its folder.
        is_inside = all(os.path.basename(name) == name and name not in ("", ".", "..") for name in files)
        if (
            is_whole
            and is_inside
            and _SHARDS.fullmatch(manifest["shards"])
            and _REST in files
            and isinstance(files, dict)
        ):
            return manifest
    except FileNotFoundError:
        raise UnreadableCheckpointError(f"{path} has no {MANIFEST}: it was not written to its end.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UnreadableCheckpointError(f"{path} is damaged: its {MANIFEST} is not what was written.")


def _names(path: str, shards: str) -> bool:
    """Whether a manifest that is as it was written names these shares."""
    with contextlib.suppress(UnreadableCheckpointError):
        return bool(_manifest(path)["shards"] == shards)
    return False


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _my_part(names: list[str]) -> list[str]:
    return names[comm.get_rank() :: comm.get_world_size()]


def _flushed(path: str) -> dict[str, Any]:
    """Size and SHA-256 of a file that is on disk from now on."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return _summary(file)


def _compare(path: str, expected: dict[str, Any]) -> None:
    try:
        with open(path, "rb") as file:
            found = _summary(file)
    except FileNotFoundError:
        raise UnreadableCheckpointError(f"{path} is not there, but {MANIFEST} names it.") from None
    if found != expected:
        raise UnreadableCheckpointError(f"{path} is damaged: its content is not what was written (size or SHA-256).")


def _summary(file: Any) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _without_shared(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with a place for each shared tensor, which goes to ``tensors``."""
    if is_shared(value):
        tensors[key] = value.detach()
        return {_PLACE: key}
    if isinstance(value, dict):
        return {name: _without_shared(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_shared(item, f"{key}/{i}", tensors) for i, item in enumerate(value))
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of ``_without_shared``."""
    if isinstance(value, dict):
        if value.keys() == {_PLACE}:
            return tensors[value[_PLACE]]
        return {name: _with_tensors(item, tensors) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item, tensors) for item in value)
    return value
