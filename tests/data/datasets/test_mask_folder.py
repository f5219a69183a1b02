from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import MaskFolder, build_dataset, build_datasets
from tests.masks import CLASS_NAMES, draw, write_mask_folder


def _image(path: Path, size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def _mask(path: Path, values: list[list[int]], mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.array(values, dtype=np.uint8))
    if mode == "P":
        mask.putpalette([17, 99, 3] * 256)  # the index counts, not its colour
        assert mask.mode == "P"
    mask.convert(mode).save(path)


def test_masks_belong_to_their_images(tmp_path: Path) -> None:
    dataset = build_dataset(write_mask_folder(tmp_path, 3))
    assert len(dataset) == 3
    assert dataset.mask_class_names == list(CLASS_NAMES)
    assert dataset.class_names is None
    for i in range(3):
        image, mask = draw(i)
        assert np.array_equal(np.asarray(dataset.load(i)), image)
        assert np.array_equal(dataset.load_mask(i), mask)
        assert dataset.load_mask(i).dtype == np.uint8
    assert dataset.describe(1) == str(tmp_path / "images" / "01.png")
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).load_mask(2), draw(2)[1])


def test_two_folders_with_sub_folders_and_other_extensions(tmp_path: Path) -> None:
    """Sorted by their own names the two folders have another order: a-1 < a/1 as files, but a.jpg ..."""
    for name in ("b/2.jpg", "a-1.webp", "a/1.bmp"):
        _image(tmp_path / "photos" / name)
    for value, name in enumerate(("b/2.png", "a-1.PNG", "a/1.png")):
        _mask(tmp_path / "labels" / name, [[value] * 3] * 2, "P")
    dataset = build_dataset(f"masks:images={tmp_path / 'photos'}:masks={tmp_path / 'labels'}:num_classes=3")
    values = {Path(dataset.describe(i)).stem: int(dataset.load_mask(i)[0, 0]) for i in range(3)}
    assert values == {"2": 0, "a-1": 1, "1": 2}
    assert dataset.mask_class_names == ["0", "1", "2"]


def test_another_value_may_be_the_one_to_ignore(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "x.png")
    _mask(tmp_path / "masks" / "x.png", [[0, 1, 2], [2, 0, 1]])
    assert build_dataset(f"masks:{tmp_path}:num_classes=3:ignore=0").load_mask(0).tolist() == [[255, 1, 2], [2, 255, 1]]


def test_several_datasets_have_masks_if_their_classes_are_the_same(tmp_path: Path) -> None:
    strings = [write_mask_folder(tmp_path / name, 2, seed) for name, seed in (("a", 0), ("b", 7))]
    both = build_datasets(strings)
    assert both.mask_class_names == list(CLASS_NAMES)
    assert np.array_equal(both.load_mask(3), draw(8)[1])
    mixed = build_datasets([strings[0], "synthetic:num_images=2"])
    assert mixed.mask_class_names is None
    assert mixed.load_mask(0) is None


def test_images_and_masks_that_do_not_match_are_counted(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 2)
    for i in range(7):
        _image(tmp_path / "images" / f"new{i}.png")
    _mask(tmp_path / "masks" / "old.png", [[0]])
    expected = r"7 image\(s\) have no mask \(new0, new1, new2, new3, new4 \.\.\.\), 1 mask\(s\) have no image \(old\)"
    with pytest.raises(ValueError, match=expected):
        MaskFolder(str(tmp_path))


def test_names_that_say_two_things_are_refused(tmp_path: Path) -> None:
    write_mask_folder(tmp_path, 1)
    _image(tmp_path / "images" / "00.jpg")
    with pytest.raises(ValueError, match="several files of the name 00 that differ in their extension"):
        MaskFolder(str(tmp_path))
    (tmp_path / "images" / "00.jpg").unlink()
    (tmp_path / "masks" / "00.png").rename(tmp_path / "masks" / "00.jpg")
    with pytest.raises(ValueError, match=r"Masks are PNG files, and 1 of .*00\.jpg"):
        MaskFolder(str(tmp_path))


def test_masks_that_cannot_be_are_named(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "x.png")
    path = tmp_path / "masks" / "x.png"
    text = f"masks:{tmp_path}:num_classes=2"
    _mask(path, [[0, 7, 3], [1, 255, 9]])
    with pytest.raises(ValueError, match=r"x\.png has the value\(s\) 3, 7, 9, and there are classes 0\.\.1"):
        build_dataset(text).load_mask(0)
    _mask(path, [[0, 1], [1, 0], [1, 0]])
    with pytest.raises(ValueError, match=r"2 x 3 pixels \(width x height\), its image 3 x 2"):
        build_dataset(text).load_mask(0)
    _mask(path, [[0, 1, 0], [1, 0, 1]], "RGB")
    with pytest.raises(ValueError, match="is a RGB image; a mask is an indexed or grey PNG"):
        build_dataset(text).load_mask(0)
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"x\.png is not a readable image"):
        build_dataset(text).load_mask(0)


def test_classes_are_stated_once_and_well(tmp_path: Path) -> None:
    text = write_mask_folder(tmp_path, 1)
    with pytest.raises(ValueError, match=r"classes\.txt names 3 classes, and num_classes=4"):
        build_dataset(f"{text}:num_classes=4")
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="none empty, none twice"):
        build_dataset(text)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"write their names into .*classes\.txt.* or add :num_classes=N"):
        build_dataset(text)
    with pytest.raises(ValueError, match="1 to 255 classes, got 256"):
        build_dataset(f"{text}:num_classes=256")
    with pytest.raises(ValueError, match=r"0\.\.255, so ignore must be one of them; got ignore=-1"):
        build_dataset(f"{text}:num_classes=3:ignore=-1")


@pytest.mark.parametrize("text", ["masks", "masks:images=/a", "masks:masks=/a", "masks:/r:images=/a:masks=/b"])
def test_half_a_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is named masks:/data .* or masks:images=/path:masks=/path; got"):
        build_dataset(text)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images does not exist"):
        build_dataset(f"masks:{tmp_path}")
