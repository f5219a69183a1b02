from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinoengine.data.array_file import read_arrays, write_arrays

ARRAYS = {
    "bytes": np.arange(7, dtype=np.uint8),
    "table": np.arange(6, dtype=np.int64).reshape(2, 3),
    "none": np.zeros((0, 4), dtype=np.float32),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "a.index")
    arrays = ARRAYS
    write_arrays(path, {"root": "/a\udce9", "n": 3}, arrays)
    read = read_arrays(path)
    assert read.facts == {"root": "/a\udce9", "n": 3}
    assert list(read.arrays) == list(arrays)
    for name, array in arrays.items():
        assert read.arrays[name].dtype == array.dtype
        assert np.array_equal(read.arrays[name], array)
        assert not read.arrays[name].flags.writeable
    assert read.mtime_ns == Path(path).stat().st_mtime_ns


def test_an_open_file_stays_what_it_was_when_another_takes_its_name(tmp_path: Path) -> None:
    path = str(tmp_path / "a.index")
    write_arrays(path, {}, {"a": np.zeros(5000)})
    old = read_arrays(path).arrays["a"]
    write_arrays(path, {}, {"a": np.ones(5000)})
    assert old.sum() == 0
    assert read_arrays(path).arrays["a"].sum() == 5000


@pytest.mark.parametrize("damage", ["empty", "other", "header", "cut", "objects", "no arrays", "long header"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.index"
    write_arrays(str(path), {}, {"a": np.arange(100)})
    data = path.read_bytes()
    header = {
        "empty": b"",
        "other": b"PK\x03\x04" + data[4:],
        "header": data[:20] + b"}" + data[21:],
        "cut": data[:-80],
        "objects": data.replace(b"<i8", b"|O8"),
        "no arrays": data.replace(b'"arrays"', b'"ARRAYS"'),
        "long header": data[:8] + b"\xff" * 8 + data[16:],
    }
    path.write_bytes(header[damage])
    with pytest.raises(ValueError, match=str(path)):
        read_arrays(str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_arrays(str(tmp_path / "none"))
