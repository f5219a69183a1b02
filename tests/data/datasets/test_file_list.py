from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import UnreadableImageError, build_dataset


def _images(folder: Path, *names: str) -> None:
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 2), value, dtype=np.uint8)).save(folder / name)


def _write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return f'list:"{path}"'


def _values(dataset: Any) -> list[int]:
    return [int(np.asarray(dataset.load(i))[0, 0]) for i in range(len(dataset))]


def test_a_text_in_its_own_order_with_relative_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _images(tmp_path / "x: y", "a.png", "ü b/c, d.png", "e.png")
    text = _write(tmp_path / "x: y" / "files.txt", f"\ufeffe.png\r\n\r\nü b/c, d.png\n{tmp_path}/x: y/a.png\ne.png")
    monkeypatch.chdir("/")
    dataset = build_dataset(text)
    assert _values(dataset) == [2, 1, 0, 2]
    assert not dataset.has_labels
    assert dataset.path(1) == dataset.describe(1) == str(tmp_path / "x: y" / "ü b" / "c, d.png")
    assert _values(pickle.loads(pickle.dumps(dataset))) == [2, 1, 0, 2]


def test_another_root(tmp_path: Path) -> None:
    _images(tmp_path / "images", "a.png")
    assert _values(build_dataset(_write(tmp_path / "f.txt", "a.png") + f":root={tmp_path}/images")) == [0]


def test_a_csv_with_labels(tmp_path: Path) -> None:
    _images(tmp_path, "a.png", "b, c.png", "d.png")
    text = _write(tmp_path / "f.csv", 'id,path,label\n1,a.png,dog\n2,"b, c.png",cat\n\n3,d.png,dog\n')
    dataset = build_dataset(text)
    assert (_values(dataset), dataset.class_names) == ([0, 1, 2], ["cat", "dog"])
    assert [dataset.label(i) for i in range(3)] == dataset.labels().tolist() == [1, 0, 1]
    by_id = build_dataset(f"{text}:label=id")
    assert (by_id.class_names, by_id.label(2)) == (["1", "2", "3"], 2)


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    _images(tmp_path, "a.png")
    dataset = build_dataset(_write(tmp_path / "f.csv", "file,label\n" + "a.png,10\na.png,9\na.png,2\n") + ":path=file")
    assert dataset.class_names == ["2", "9", "10"]
    assert [dataset.label(i) for i in range(3)] == [2, 1, 0]


def test_a_csv_without_labels(tmp_path: Path) -> None:
    _images(tmp_path, "a.png")
    assert build_dataset(_write(tmp_path / "f.csv", "path\na.png\n")).class_names is None


def test_missing_files_are_counted_and_five_are_named(tmp_path: Path) -> None:
    _images(tmp_path, "a.png")
    text = _write(tmp_path / "f.txt", "a.png\n" + "".join(f"no{i}.png\n" for i in range(7)))
    with pytest.raises(
        FileNotFoundError, match=r"7 of the 8 files .*f\.txt lists are missing.*root=.*\n(.*no\d\.png\n?){5}$"
    ):
        build_dataset(text)
    dataset = build_dataset(f"{text}:check=false")
    assert len(dataset) == 8
    with pytest.raises(UnreadableImageError, match=r"no0\.png"):
        dataset.load(1)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("f.txt", "\n \n", "lists no image"),
        ("f.csv", "", r"no column 'path'; its columns are none"),
        ("f.csv", "path\n", "lists no image"),
        (
            "f.csv",
            "paths,label\na,b\n",
            r"no column 'path' \(did you mean 'paths'\?\); its columns are paths, label.*path=",
        ),
        ("f.csv", "path;label\na.png;1\n", r"columns are path;label\. Columns are parted by commas.*by ';': save"),
        ("f.csv", "path,label\na.png\n", r"line 2: 1 values, and there are 2 columns: path, label.*quotes"),
        ("f.csv", "path,label\na.png,\n", r"column 'label' is empty in 1 row\(s\), the first of them 1"),
        ("f.json", "[]", r"ends with \.txt, \.csv, \.parquet; got"),
    ],
)
def test_wrong_lists(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dataset(_write(tmp_path / name, content))


def test_columns_of_a_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name columns of a table"):
        build_dataset(_write(tmp_path / "f.txt", "a.png") + ":label=x")


def test_a_missing_list(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"list of images .*none\.txt does not exist"):
        build_dataset(f"list:{tmp_path}/none.txt")


def test_parquet_through_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the one function of pyarrow that is called, and for what of its table is."""
    _images(tmp_path, "a.png", "b.png")
    read: list[str] = []

    def read_table(path: str) -> Any:
        read.append(path)
        columns = [
            types.SimpleNamespace(to_pylist=lambda: ["b.png", "a.png"]),
            types.SimpleNamespace(to_pylist=lambda: [7, 3]),
        ]
        return types.SimpleNamespace(column_names=["path", "label"], column=columns.__getitem__)

    package = types.ModuleType("pyarrow")
    package.parquet = types.SimpleNamespace(read_table=read_table)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    dataset = build_dataset(_write(tmp_path / "f.parquet", "PAR1"))
    assert read == [str(tmp_path / "f.parquet")]
    assert (_values(dataset), dataset.class_names, dataset.label(0)) == ([1, 0], ["3", "7"], 1)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'dinoengine\[parquet\]'"):
        build_dataset(_write(tmp_path / "f.parquet", "PAR1"))


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path: Path) -> None:
    _images(tmp_path, "a.png", "b.png")
    text = _write(tmp_path / "f.csv", "path,path,note,note\na.png,b.png,1,2\n")
    with pytest.raises(
        ValueError, match=r"2 columns 'path', so it is not clear which .* path, path, note, note\. Rename"
    ):
        build_dataset(text)
    with pytest.raises(ValueError, match=r"2 columns 'label'.*label=\.$"):
        build_dataset(_write(tmp_path / "g.csv", "path,label,label\na.png,b.png,1\n"))
    once = _write(tmp_path / "h.csv", "note,path,note\n1,a.png,2\n")
    assert _values(build_dataset(once)) == [0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.txt", b"\xff\xd8\xff\xe0\0\x10JFIF\0", r"f\.txt is no text: it begins with the bytes b'\\xff\\xd8"),
        ("f.csv", b"\x89PNG\r\n\x1a\n\0\0\0", r"f\.csv is no text"),
        ("f.csv", b'path\n"' + b"a" * 200_000, r"f\.csv, line 2: field larger than field limit.*quote not closed"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_dataset(f"list:{tmp_path}/{name}")


def test_a_name_may_hold_what_unicode_calls_an_end_of_line(tmp_path: Path) -> None:
    _images(tmp_path, "a\u2028b\x85c\x0c.png")
    assert _values(build_dataset(_write(tmp_path / "f.txt", "a\u2028b\x85c\x0c.png\n"))) == [0]


def test_members_of_shards_in_a_list_are_told_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "s.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"1 of the 1 files(.|\n)*members of shards, which a list cannot name"):
        build_dataset(_write(tmp_path / "f.csv", f"path\n{tmp_path}/s.tar/1.png\n"))


def test_empty_lines_before_the_names_of_columns_count_for_nothing(tmp_path: Path) -> None:
    _images(tmp_path, "a.png")
    assert _values(build_dataset(_write(tmp_path / "f.csv", "\n\npath\na.png\n"))) == [0]
