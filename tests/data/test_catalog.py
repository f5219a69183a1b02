from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import (
    DATASET_REGISTRY,
    ConcatImageDataset,
    DatasetCatalog,
    Digits,
    ImageDataset,
    ImageFolder,
    MetadataCatalog,
    Synthetic,
    build_dataset,
    build_datasets,
)


class Recorder(ImageDataset):
    """Keeps the arguments it was made with."""

    def __init__(self, root: str, text: str = "", number: int = 1, share: float = 0.5, flag: bool = False) -> None:
        self.arguments = (root, text, number, share, flag)

    def __len__(self) -> int:
        return 1

    def load(self, index: int) -> Image.Image:
        return Image.new("L", (1, 1))


class NoParameters(Recorder):
    def __init__(self) -> None:
        super().__init__("fixed")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registers ``recorder`` and ``bare``, and takes back what a test registers."""
    before = dict(DATASET_REGISTRY._obj_map)
    names = DatasetCatalog.list()
    DATASET_REGISTRY.register("recorder", Recorder)
    DATASET_REGISTRY.register("bare", NoParameters)
    yield
    DATASET_REGISTRY._obj_map.clear()
    DATASET_REGISTRY._obj_map.update(before)
    for name in set(DatasetCatalog.list()) - set(names):
        DatasetCatalog.remove(name)


def _arguments(text: str) -> tuple[Any, ...]:
    dataset = build_dataset(text)
    assert isinstance(dataset, Recorder)
    return dataset.arguments


# ---- grammar


@pytest.mark.parametrize(
    "text, expected",
    [
        ("recorder:/data", ("/data", "", 1, 0.5, False)),
        ("recorder:root=/data", ("/data", "", 1, 0.5, False)),
        ("recorder:/data:number=3", ("/data", "", 3, 0.5, False)),
        ("recorder:number=3:root=/data", ("/data", "", 3, 0.5, False)),
        ("recorder:/data:number=-3:flag=true:share=1e-3:text=a", ("/data", "a", -3, 1e-3, True)),
        ("recorder:/data:flag=False", ("/data", "", 1, 0.5, False)),
        ("recorder:/data:flag=TRUE", ("/data", "", 1, 0.5, True)),
        ("recorder:/data:share=2", ("/data", "", 1, 2.0, False)),
        ("recorder:/data:text=", ("/data", "", 1, 0.5, False)),
        ("recorder:/data:text=a=b", ("/data", "a=b", 1, 0.5, False)),
        # Colons and equal signs of a path belong to the path.
        ("recorder:/data/a=b:c", ("/data/a=b:c", "", 1, 0.5, False)),
        ("recorder:/data/a=b:c:number=2", ("/data/a=b:c", "", 2, 0.5, False)),
        ("recorder:C:\\photos", ("C:\\photos", "", 1, 0.5, False)),
        ("recorder:s3://bucket/x:number=2", ("s3://bucket/x", "", 2, 0.5, False)),
        ("recorder:/a/number=2", ("/a/number=2", "", 1, 0.5, False)),
        ("recorder:/a:b:", ("/a:b:", "", 1, 0.5, False)),
        ("bare", ("fixed", "", 1, 0.5, False)),
    ],
)
def test_strings(text: str, expected: tuple[Any, ...]):
    arguments = _arguments(text)
    assert arguments == expected
    assert [type(a) for a in arguments] == [type(e) for e in expected]


@pytest.mark.parametrize(
    "text, message",
    [
        ("recorder", r"'recorder' needs root\. Grammar: name\["),
        ("recorder:", r"'recorder:' needs root\."),
        ("recorder:number=2", r"needs root\."),
        ("recorder:/data:number=2:number=3", r"gives 'number' twice\. Grammar: name\["),
        ("recorder:/data:root=/other", r"'/data' is not understood.*Its keys: root, text, number, share, flag"),
        ("recorder:/data:number=two", r"'recorder:/data:number=two': number must be int, got 'two'"),
        ("recorder:/data:number=1.5", r"number must be int, got '1\.5'\. Grammar: name\["),
        ("recorder:/data:number=", r"number must be int, got ''"),
        # The one spelling that could be a path or a key is an error, not a guess.
        ("recorder:/data:number=2/b", r"number must be int, got '2/b'"),
        ("recorder:/data:share=half", r"share must be float, got 'half'"),
        ("recorder:/data:flag=yes", r"flag must be bool, got 'yes'"),
        ("digits:splt=test", r"'splt=test' is not understood \(did you mean 'split'\?\)\. Its keys: split\. Grammar"),
        ("digits:test", r"'test' is not understood.*Its keys: split"),
        ("digits:split=test:size=3", r"'split=test:size=3' is not understood.*Its keys: split"),
        ("synthetic:num_image=3", r"\(did you mean 'num_images'\?\)"),
        ("bare:x", r"'x' is not understood\. Its keys: none"),
    ],
)
def test_wrong_strings_say_which_part_and_what_is_possible(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_dataset(text)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "digit",
            r"No dataset 'digit' \(in 'digit'\) \(did you mean 'digits'\?\)\. Known: .*digits.*folder.*synthetic",
        ),
        ("digts:split=test", r"\(in 'digts:split=test'\) \(did you mean 'digits'\?\)"),
        ("/data/photos", r"for a folder of images write 'folder:/data/photos'"),
        ("~/photos", r"write 'folder:~/photos'"),
        ("./photos", r"write 'folder:\./photos'"),
        ("", r"No dataset ''.*Grammar: name\["),
        (":split=test", r"No dataset ''"),
    ],
)
def test_unknown_names_list_the_known_ones(text: str, message: str):
    with pytest.raises(KeyError, match=message):
        build_dataset(text)


class _Named(ImageDataset):
    """A dataset of given length and class names."""

    def __init__(self, length: int, **names: list[str]) -> None:
        self.length = length
        vars(self).update(names)

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["class_names", "multi_label_class_names", "mask_class_names"])
def test_two_classes_of_one_name_are_refused(kind: str):
    DatasetCatalog.register("twins", lambda: _Named(3, **{kind: ["cat", "crane", "dog", "crane"]}))
    try:
        with pytest.raises(ValueError, match=r"'twins' has 4 classes, and 1 name\(s\) stand for more.*: 'crane'\."):
            build_dataset("twins")
    finally:
        DatasetCatalog.remove("twins")


def test_an_empty_dataset_is_refused():
    DatasetCatalog.register("empty", lambda: _Named(0))
    try:
        with pytest.raises(ValueError, match="'empty' holds no image"):
            build_dataset("empty")
    finally:
        DatasetCatalog.remove("empty")


@pytest.mark.parametrize("name", ["folder", "list", "wds", "ImageNet", "ImageNet22k", "voc2007", "hf"])
def test_an_empty_path_is_not_the_current_folder(name: str):
    with pytest.raises(ValueError, match=r"needs \w+\. Grammar: name\["):
        build_dataset(f'{name}:""')


def test_the_error_of_a_dataset_itself_comes_through():
    with pytest.raises(ValueError, match="train, test, all; got 'tst'"):
        build_dataset("digits:split=tst")
    with pytest.raises(FileNotFoundError, match="/nowhere:recursive=yes does not exist"):
        build_dataset("folder:/nowhere:recursive=yes")


# ---- registries


def test_built_in_datasets(tmp_path: Path):
    assert {"digits", "folder", "synthetic"} <= set(DATASET_REGISTRY.names())
    digits = build_dataset("digits:split=test")
    assert isinstance(digits, Digits)
    assert len(digits) == 360
    synthetic = build_dataset("synthetic:num_images=7:num_classes=3:size=16:seed=5")
    assert isinstance(synthetic, Synthetic)
    assert (len(synthetic), synthetic.num_classes, synthetic.size, synthetic.seed) == (7, 3, 16, 5)
    folder_path = tmp_path / "a=b:c"
    folder_path.mkdir()
    Image.new("L", (2, 2)).save(folder_path / "1.png")
    folder = build_dataset(f"folder:{folder_path}")
    assert isinstance(folder, ImageFolder)
    assert folder.path(0) == str(folder_path / "1.png")


def test_a_function_can_be_registered():
    @DATASET_REGISTRY.register("twice")
    def make(num_images: int = 2) -> ImageDataset:
        return Synthetic(num_images=2 * num_images, size=8)

    assert len(build_dataset("twice")) == 4
    assert len(build_dataset("twice:num_images=3")) == 6


def test_a_parameter_may_be_optional():
    @DATASET_REGISTRY.register("optional")
    def make(limit: int | None = None) -> ImageDataset:
        return Synthetic(num_images=limit or 5, size=8)

    assert len(build_dataset("optional")) == 5
    assert len(build_dataset("optional:limit=3")) == 3


def test_names_of_ones_own():
    DatasetCatalog.register("my_photos", lambda: Synthetic(num_images=3, size=8))
    assert "my_photos" in DatasetCatalog
    assert "my_photos" in DatasetCatalog.list()
    assert len(build_dataset("my_photos")) == 3
    assert DatasetCatalog.get("my_photos") is not DatasetCatalog.get("my_photos")  # made anew each time
    DatasetCatalog.remove("my_photos")
    with pytest.raises(KeyError, match="my_photos"):
        build_dataset("my_photos")


@pytest.mark.parametrize("name", ["my_photos", "digits"])
def test_a_taken_name_is_refused(name: str):
    DatasetCatalog.register("my_photos", lambda: Synthetic(size=8))
    with pytest.raises(ValueError, match=rf"named '{name}' is registered already"):
        DatasetCatalog.register(name, lambda: Synthetic(size=8))


@pytest.mark.parametrize("name", ["", "a:b"])
def test_a_name_that_no_string_could_mean_is_refused(name: str):
    with pytest.raises(ValueError, match=f"not empty and has no ':', got '{name}'"):
        DatasetCatalog.register(name, lambda: Synthetic(size=8))


def test_get_of_an_unknown_name_lists_the_names():
    DatasetCatalog.register("my_photos", lambda: Synthetic(size=8))
    with pytest.raises(KeyError, match=r"'my_photo' is not registered\. Registered: my_photos"):
        DatasetCatalog.get("my_photo")


def test_close_names_of_ones_own_are_suggested():
    DatasetCatalog.register("my_photos", lambda: Synthetic(size=8))
    with pytest.raises(KeyError, match=r"did you mean 'my_photos'\?.*Known: .*my_photos"):
        build_dataset("my_photo")


def test_arguments_for_a_name_of_ones_own_are_refused_with_the_reason():
    DatasetCatalog.register("my_photos", lambda: Synthetic(size=8))
    with pytest.raises((KeyError, ValueError)) as error:
        build_dataset("my_photos:split=train")
    assert "did you mean 'my_photos'" not in str(error.value)


# ---- several datasets


def test_one_string_is_not_wrapped_and_several_are_joined_in_order():
    assert isinstance(build_datasets(["digits:split=test"]), Digits)
    joined = build_datasets(("synthetic:num_images=2:size=8", "synthetic:num_images=3:size=8:seed=1"))
    assert isinstance(joined, ConcatImageDataset)
    assert len(joined) == 5
    assert np.array_equal(np.asarray(joined.load(2)), Synthetic(num_images=3, size=8, seed=1).render(0))
    assert joined.has_labels


def test_no_string_is_refused():
    with pytest.raises(ValueError, match=r"No dataset is named; expected at least one of the form name\["):
        build_datasets(())


# ---- metadata


def test_metadata_is_written_once():
    facts = MetadataCatalog.get("test_metadata_is_written_once")
    facts.set(licence="CC0", classes=["a"])
    assert MetadataCatalog.get("test_metadata_is_written_once").licence == "CC0"
    assert facts.name == "test_metadata_is_written_once"
    facts.licence = "CC0"  # the same value again is no change
    with pytest.raises(ValueError, match="'licence' is 'CC0' already; it cannot become 'MIT'"):
        facts.licence = "MIT"
    with pytest.raises(ValueError, match=r"'classes' is \['a'\] already"):
        facts.set(classes=["b"])
    assert facts.licence == "CC0"


def test_metadata_of_another_dataset_is_another():
    MetadataCatalog.get("test_metadata_a").set(size=1)
    MetadataCatalog.get("test_metadata_b").set(size=2)
    assert MetadataCatalog.get("test_metadata_a").size == 1
    with pytest.raises(AttributeError, match="colour"):
        _ = MetadataCatalog.get("test_metadata_a").colour


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder:/nowhere:splitt=train", r"^Dataset 'folder:/nowhere:splitt=train': .* does not exist\. 'splitt=train' looks like a key, and folder: has none of that name, .* part of root\. The keys of folder: are root, cached, arrays\.$"),
        ("list:/nowhere.csv:lable=class", r"'lable=class' looks like a key, and list: has none of that name \(did you mean 'label'\?\)"),
        ("wds:/nowhere.tar:x=1", "/nowhere.tar:x=1\n'x=1' looks like a key"),
        ('folder:"/nowhere:splitt=train"', r"does not exist\.$"),
        ("folder:/nowhere=a/b", r"does not exist\.$"),
        ("masks:/nowhere", r"^Dataset 'masks:/nowhere': Image folder /nowhere/images does not exist\.$"),
    ],
)  # fmt: skip
def test_an_error_names_the_string_that_was_given_and_a_key_that_may_be_misspelt(text: str, message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        build_dataset(text)


def test_a_list_that_may_not_be_read_names_the_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a.png\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "a.txt")

    monkeypatch.setattr("dinoengine.data.datasets.file_list.open_text", refuse)  # root may read any file
    with pytest.raises(PermissionError, match=rf"^Dataset 'list:{tmp_path}/a\.txt': .*Permission denied"):
        build_dataset(f"list:{tmp_path}/a.txt")


def test_a_space_before_a_name_is_none_of_it() -> None:
    assert len(build_dataset(" synthetic:num_images=3")) == 3


def test_a_path_with_an_equal_sign_is_one_as_long_as_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "a:splitt=train").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "a:splitt=train" / "1.png")
    assert len(build_dataset(f"folder:{tmp_path}/a:splitt=train")) == 1
    (tmp_path / "a:splitt=train" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="holds no image; found nothing.*looks like a key"):
        build_dataset(f"folder:{tmp_path}/a:splitt=train")
