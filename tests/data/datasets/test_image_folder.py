from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import ImageFolder
from dinoengine.data.datasets import image_folder


def _image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 2), value, dtype=np.uint8)).save(path)
    return path


def _paths(dataset: ImageFolder) -> list[str]:
    return [os.path.relpath(dataset.path(i), dataset.root) for i in range(len(dataset))]


def _list_entries(monkeypatch: pytest.MonkeyPatch, *, reverse: bool) -> None:
    """Let the file system list its entries in this order."""
    listed = os.scandir

    class Ordered:
        def __init__(self, folder: str) -> None:
            with listed(folder) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=reverse)

        def __enter__(self) -> list[Any]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(image_folder.os, "scandir", Ordered)


def test_nested_folders_in_sorted_order_with_first_level_labels(tmp_path: Path):
    for i, name in enumerate(["dog/9.png", "cat/b/2.png", "cat/a/1.png", "dog/10.png", "ant/x/y/z/0.png"]):
        _image(tmp_path / name, i)
    dataset = ImageFolder(str(tmp_path))
    assert _paths(dataset) == ["ant/x/y/z/0.png", "cat/a/1.png", "cat/b/2.png", "dog/10.png", "dog/9.png"]
    assert dataset.class_names == ["ant", "cat", "dog"]
    assert [dataset.label(i) for i in range(5)] == [0, 1, 1, 2, 2]
    assert [int(np.asarray(dataset.load(i))[0, 0]) for i in range(5)] == [4, 2, 1, 3, 0]
    assert dataset[1].label == 1
    assert dataset[1].image.size == (2, 3)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ["b/2.png", "b/1.png", "a/3.png", "c/d/4.png"]:
        _image(tmp_path / name)
    for reverse in (False, True):
        with monkeypatch.context() as patch:
            _list_entries(patch, reverse=reverse)
            assert _paths(ImageFolder(str(tmp_path))) == ["a/3.png", "b/1.png", "b/2.png", "c/d/4.png"]


def test_images_directly_in_the_folder_make_it_unlabelled(tmp_path: Path):
    _image(tmp_path / "loose.png")
    _image(tmp_path / "cat" / "1.png")
    dataset = ImageFolder(str(tmp_path))
    assert len(dataset) == 2
    assert dataset.class_names is None
    assert not dataset.has_labels
    assert [dataset.label(i) for i in range(2)] == [None, None]


def test_a_class_folder_without_images_is_no_class(tmp_path: Path):
    _image(tmp_path / "cat" / "1.png")
    (tmp_path / "empty").mkdir()
    assert ImageFolder(str(tmp_path)).class_names == ["cat"]


@pytest.mark.parametrize(
    "extension", ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif", "ppm", "pgm", "JPG", "Jpeg", "PNG"]
)
def test_extensions_of_any_case(tmp_path: Path, extension: str):
    _image(tmp_path / f"a.b.{extension}", 200)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / extension).write_text("a name, not an extension")
    dataset = ImageFolder(str(tmp_path))
    assert len(dataset) == 1
    assert np.asarray(dataset.load(0).convert("L"))[0, 0] == pytest.approx(200, abs=2)


def test_hidden_files_and_folders_are_skipped(tmp_path: Path):
    _image(tmp_path / "1.png")
    _image(tmp_path / ".thumbnails" / "1.png")
    _image(tmp_path / "._1.png")
    assert _paths(ImageFolder(str(tmp_path))) == ["1.png"]


def test_odd_names_survive(tmp_path: Path):
    names = ["a=b:c/ü 1.png", "a=b:c/\u65e5\u672c.png", "a=b:c/new\nline.png"]
    for name in names:
        _image(tmp_path / name)
    dataset = ImageFolder(str(tmp_path))
    assert _paths(dataset) == sorted(names)
    assert all(dataset.load(i).size == (2, 3) for i in range(3))
    assert dataset.class_names == ["a=b:c"]


def test_names_that_are_not_utf8_survive(tmp_path: Path):
    try:
        _image(tmp_path / os.fsdecode(b"caf\xe9.png"))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    assert ImageFolder(str(tmp_path)).load(0).size == (2, 3)


def test_home_and_relative_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _image(tmp_path / "photos" / "1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for root in ("~/photos", "photos", "./photos/"):
        dataset = ImageFolder(root)
        monkeypatch.chdir("/")  # workers may start elsewhere
        assert dataset.describe(0) == str(tmp_path / "photos" / "1.png")
        assert dataset.load(0).size == (2, 3)
        monkeypatch.chdir(tmp_path)


def test_a_linked_folder_is_followed(tmp_path: Path):
    _image(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere")
    dataset = ImageFolder(str(tmp_path / "root"))
    assert _paths(dataset) == ["cat/1.png"]
    assert dataset.class_names == ["cat"]


def test_a_link_to_a_folder_above_ends(tmp_path: Path):
    _image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert _paths(ImageFolder(str(tmp_path))) == ["a/1.png"]


def test_labels_of_a_folder_with_two_names_do_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _image(tmp_path / "store" / "1.png")
    (tmp_path / "root").mkdir()
    for name in ("cat", "feline"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "store")
    found = set()
    for reverse in (False, True):
        with monkeypatch.context() as patch:
            _list_entries(patch, reverse=reverse)
            found.add(tuple(_paths(ImageFolder(str(tmp_path / "root")))))
    assert len(found) == 1, found


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/nowhere does not exist\."):
        ImageFolder(str(tmp_path / "nowhere"))


def test_a_file_is_no_folder(tmp_path: Path):
    path = _image(tmp_path / "1.png")
    with pytest.raises(NotADirectoryError, match=rf"{path} is a file, not a folder"):
        ImageFolder(str(path))


def test_an_empty_folder_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no image; found nothing\. Accepted extensions: \.bmp "):
        ImageFolder(str(tmp_path))


def test_a_folder_of_other_files_says_what_it_saw(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.HEIC").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README").touch()
    with pytest.raises(FileNotFoundError, match=r"found 3 x \.heic, 1 x no extension\. Accepted extensions: .*\.jpg"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "vanished", "dangling link"])
def test_a_broken_file_is_named_when_it_is_loaded(tmp_path: Path, kind: str):
    path = tmp_path / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)).save(path)
    good = path.read_bytes()
    if kind in ("empty", "text", "truncated"):
        path.write_bytes({"empty": b"", "text": b"not an image", "truncated": good[:200]}[kind])
    if kind == "dangling link":
        path.unlink()
        path.symlink_to(tmp_path / "gone.png")
    dataset = ImageFolder(str(tmp_path))
    if kind == "vanished":
        path.unlink()
    with pytest.raises(OSError, match=rf"{path} is not a readable image \(.+\)\. Remove or repair the file"):
        dataset.load(0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it finds in damaged files
def test_a_damaged_file_loads_or_raises_an_os_error_that_names_it(tmp_path: Path, kind: str):
    path = tmp_path / "1.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path, kind)
    good, dice = path.read_bytes(), random.Random(0)
    errors = []
    for trial in range(60):
        data = bytearray(good)
        for _ in range(1 + trial % 12):
            data[dice.randrange(min(len(data), 150))] = dice.randrange(256)
        path.write_bytes(bytes(data[: dice.randrange(len(data))] if trial % 4 == 0 else data))
        try:
            ImageFolder(str(tmp_path)).load(0)
        except OSError as error:
            errors.append(str(error))
    assert errors
    assert all(str(path) in error for error in errors)


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _image(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(OSError, match=rf"{path} is not a readable image \(.*decompression bomb"):
        ImageFolder(str(tmp_path)).load(0)


def test_modes_are_left_to_the_transform(tmp_path: Path):
    Image.new("RGBA", (2, 2), (1, 2, 3, 4)).save(tmp_path / "1.png")
    assert ImageFolder(str(tmp_path)).load(0).mode == "RGBA"


def test_a_pickled_copy_is_the_same_and_small(tmp_path: Path):
    for i in range(20):
        _image(tmp_path / "cat" / f"{i:02d}.png", i)
    dataset = ImageFolder(str(tmp_path))
    data = pickle.dumps(dataset)
    copy = pickle.loads(data)
    assert _paths(copy) == _paths(dataset)
    assert copy.label(3) == 0
    assert int(np.asarray(copy.load(7))[0, 0]) == 7
    assert len(data) < 20 * 100
