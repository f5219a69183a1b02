"""With a stand-in for the few calls of the library ``datasets``."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import UnreadableImageError, build_dataset


class FakeImage:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class FakeTable:
    """Columns; images are given decoded unless the column was cast."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features, self.column_names = columns, features, list(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        assert not self.features["image"].decode
        return {name: values[key] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> FakeTable:
        return FakeTable({n: self.columns[n] for n in names}, {n: self.features[n] for n in names})

    def cast_column(self, name: str, feature: Any) -> FakeTable:
        return FakeTable(self.columns, {**self.features, name: feature})


class FakeDict(dict[str, FakeTable]):
    pass


def _stored(path: Path) -> list[dict[str, Any]]:
    out = io.BytesIO()
    Image.fromarray(np.full((3, 2), 5, dtype=np.uint8)).save(out, "PNG")
    (path / "7.png").write_bytes(out.getvalue())
    return [
        {"bytes": out.getvalue(), "path": None},
        {"bytes": None, "path": str(path / "7.png")},
        {"bytes": b"x", "path": None},
    ]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []
    names = types.SimpleNamespace(names=["cat", "dog"])
    columns = {"image": _stored(tmp_path), "label": [1, 0, 1], "score": ["b", "a", "b"]}
    table = FakeTable(columns, {"image": FakeImage(), "label": names, "score": "string"})
    hidden = FakeTable({**columns, "label": [-1, -1, -1]}, table.features)
    library = types.ModuleType("datasets")
    library.Image, library.DatasetDict = FakeImage, FakeDict  # type: ignore[attr-defined]
    library.load_from_disk = lambda path: asked.append(path) or table  # type: ignore[attr-defined]
    library.load_dataset = lambda *a: asked.append(a) or FakeDict(train=table, test=hidden)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def test_images_as_they_are_stored_with_the_names_of_classes(asked: list[Any]) -> None:
    dataset = build_dataset("hf:someone/flowers:config=small")
    assert asked == [("someone/flowers", "small")]
    assert (len(dataset), dataset.class_names, [dataset.label(i) for i in range(3)]) == (3, ["cat", "dog"], [1, 0, 1])
    assert [int(np.asarray(dataset.load(i))[0, 0]) for i in (0, 1)] == [5, 5]
    with pytest.raises(UnreadableImageError, match=r"hf:someone/flowers:split=train\[2\] is not a readable image"):
        dataset.load(2)


def test_a_saved_folder_and_labels_that_are_texts(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "state.json").touch()
    dataset = build_dataset(f"hf:{tmp_path}:label=score")
    assert asked == [str(tmp_path)]
    assert (dataset.class_names, dataset.label(0), dataset.label(1)) == (["a", "b"], 1, 0)


def test_labels_that_are_not_told(asked: list[Any]) -> None:
    assert build_dataset("hf:someone/flowers:split=test").class_names is None


@pytest.mark.parametrize(
    "keys, message",
    [
        ("split=tran", r"no such split \(did you mean 'train'\?\); splits: train, test"),
        ("image=img", r"no column 'img'.*columns: image, label, score\. Write image=NAME"),
        ("label=labl", r"no column 'labl' \(did you mean 'label'\?\)"),
        ("image=score", r"column 'score' holds no images but string"),
    ],
)
def test_wrong_strings(asked: list[Any], keys: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_dataset(f"hf:someone/flowers:{keys}")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'dinoengine\[hf\]'"):
        build_dataset("hf:someone/flowers")
