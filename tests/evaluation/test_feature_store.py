from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinoengine.data import build_dataset
from dinoengine.evaluation import FeatureStore
from dinoengine.evaluation.feature_store import StoreWriter, index_rows, require_pyarrow
from dinoengine.utils import comm

DATASET = build_dataset("synthetic:num_images=5:num_classes=2:size=8")
ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)


def _writer(path: Path, **options: Any) -> StoreWriter:
    settings = {"dataset": "d", "num_images": 5, "k": 1}
    return StoreWriter(str(path), DATASET, settings, {"x": ((2,), "float32")}, **options)


def _write(writer: StoreWriter, images: list[int]) -> None:
    writer.write(np.array(images), {"x": ROWS[images]})


def test_rows_in_any_order_and_runs_make_one_store(tmp_path: Path) -> None:
    first = _writer(tmp_path / "s")
    assert first.missing() == [0, 1, 2, 3, 4]
    _write(first, [3, 0])
    first.flush()
    _write(first, [2])  # lost: it was never flushed
    first.close()
    second = _writer(tmp_path / "s")
    assert second.missing() == [1, 2, 4]
    _write(second, [4, 2, 1])
    second.finish(note="n")
    store = FeatureStore(str(tmp_path / "s"))
    np.testing.assert_array_equal(store.features["x"], ROWS)
    assert store.meta["note"] == "n"
    assert not store.features["x"].flags.writeable


def test_a_store_with_missing_rows_cannot_be_finished(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "s")
    _write(writer, [0, 1, 2])
    with pytest.raises(RuntimeError, match=r"2 rows were never written"):
        writer.finish()
    assert not (tmp_path / "s").exists()


def test_a_crash_while_the_files_are_made_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _writer(tmp_path / "s")
    assert not (tmp_path / "s.unfinished").exists()
    assert _writer(tmp_path / "s").missing() == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["s.unfinished"]


def test_files_have_all_their_blocks_before_a_row_is_written(tmp_path: Path) -> None:
    writer = StoreWriter(str(tmp_path / "s"), DATASET, {}, {"x": ((2**17,), "float32")})
    writer.close()
    stat = os.stat(tmp_path / "s.unfinished" / "x.npy")
    assert stat.st_size > 5 * 2**19
    assert stat.st_blocks * 512 >= stat.st_size


def test_a_full_disk_is_said_before_a_row_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
        with pytest.raises(OSError, match=rf"features need 10 MiB in {tmp_path}, where 3 MiB are free \(No space left"):
            StoreWriter(str(tmp_path / "s"), DATASET, {}, {"x": ((2**19,), "float32")})
    assert list(tmp_path.iterdir()) == []
    _writer(tmp_path / "s").close()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, None])
def test_where_blocks_cannot_be_allocated_the_store_is_made_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def unsupported(descriptor: int, offset: int, size: int) -> None:
        raise OSError(code, "unsupported")

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    writer = _writer(tmp_path / "s")
    _write(writer, [0, 1, 2, 3, 4])
    writer.finish()
    np.testing.assert_array_equal(FeatureStore(str(tmp_path / "s")).features["x"], ROWS)


def test_two_runs_never_write_at_once(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "s")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"Another run is writing .*s.unfinished now; wait for it"):
            _writer(tmp_path / "s", overwrite=overwrite)
    writer.close()
    again = _writer(tmp_path / "s", overwrite=True)
    assert again.missing() == [0, 1, 2, 3, 4]


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"s exists and holds no features; name another place"):
            _writer(tmp_path / "s", overwrite=overwrite)
    assert (tmp_path / "s" / "thesis.txt").read_text() == "years"


def test_files_that_changed_under_the_same_dataset_string_are_another_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _writer(tmp_path / "s").close()
    monkeypatch.setattr(type(DATASET), "describe", lambda self, index: f"renamed {index}")
    with pytest.raises(ValueError, match=r"index_sha256: \w+ and \w+"):
        _writer(tmp_path / "s")


def test_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There are no features in .*nothing \(no meta.json\)"):
        FeatureStore(str(tmp_path / "nothing"))


def test_tokens_that_were_not_extracted_are_asked_for_with_what_is_there(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "s")
    _write(writer, [0, 1, 2, 3, 4])
    writer.finish()
    store = FeatureStore(str(tmp_path / "s"))
    with pytest.raises(KeyError) as error:
        store.features["patch"]
    assert str(error.value).startswith(f"{tmp_path / 's'} has no 'patch'; it has x. Extract again")
    assert "--tokens x,patch" in str(error.value)
    assert store.features.get("patch") is None  # what may be absent is asked for in this way


def test_processes_of_several_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(comm, "get_local_size", lambda: 2)
    with pytest.raises(ValueError, match=r"processes of one machine"):
        _writer(tmp_path / "s")


def test_index_rows_hold_names_labels_and_classes() -> None:
    assert index_rows(DATASET)[3] == {"name": "synthetic:seed=0[3]", "label": 1, "class": DATASET.class_names[1]}  # type: ignore[index]


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs pyarrow \(pip install 'dinoengine\[parquet\]'\)"):
        require_pyarrow()


def test_the_parquet_index_is_the_same_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    writer = _writer(tmp_path / "s")
    _write(writer, [0, 1, 2, 3, 4])
    writer.finish(parquet=True)
    assert parquet.read_table(tmp_path / "s" / "index.parquet").to_pylist() == index_rows(DATASET)


def test_a_meta_file_of_something_else_does_not_make_a_store(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "meta.json").write_text('{"my": "dataset"}')
    with pytest.raises(ValueError, match=r"holds no features; name another place"):
        _writer(tmp_path / "s", overwrite=True)
    assert (tmp_path / "s" / "meta.json").exists()


@pytest.mark.parametrize("call", range(3))
def test_a_crash_at_any_moment_of_the_end_can_be_gone_on_from(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def crash(*args: Any) -> None:
        calls.append(args)
        if len(calls) > call:
            raise KeyboardInterrupt
        original[len(args)](*args)

    original = {1: os.remove, 2: os.rename}
    writer = _writer(tmp_path / "s")
    _write(writer, [0, 1, 2, 3, 4])
    monkeypatch.setattr(os, "remove", crash)
    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    monkeypatch.undo()
    writer.close()
    again = _writer(tmp_path / "s")
    if not again.is_finished:
        assert again.missing() == []
        again.finish()
    np.testing.assert_array_equal(FeatureStore(str(tmp_path / "s")).features["x"], ROWS)
