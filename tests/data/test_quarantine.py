"""What a quarantine list leaves out of the training, and what it says."""

from __future__ import annotations

import logging
import os
import pickle
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from dinoengine.config import get_cfg
from dinoengine.data import ConcatImageDataset, ImageFolder, Synthetic, build_train_loader
from dinoengine.data.quarantine import RemainingImages, read_quarantine, without_quarantined, write_quarantine


def _images(root: Path, count: int = 6) -> list[str]:
    for i in range(count):
        folder = root / ("ab"[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
    return [str(path) for path in sorted(root.rglob("*.png"))]


def _list(file: Path, *lines: str) -> str:
    file.write_bytes(b"".join(os.fsencode(line) + b"\n" for line in lines))
    return str(file)


@pytest.mark.parametrize("left_out", [[], [0], [5], [2, 3], [0, 1, 5], [4, 0, 2]])
def test_the_others_keep_their_order_and_labels(tmp_path: Path, left_out: list[int]) -> None:
    _images(tmp_path)
    whole = ImageFolder(str(tmp_path))
    rest = pickle.loads(pickle.dumps(RemainingImages(whole, left_out)))
    kept = [i for i in range(6) if i not in left_out]
    assert [rest.describe(i) for i in range(len(rest))] == [whole.describe(i) for i in kept]
    assert [rest.path(i) for i in range(len(rest))] == [whole.path(i) for i in kept]
    assert [rest.label(i) for i in range(len(rest))] == [whole.label(i) for i in kept]
    assert [rest.load(i).getpixel((0, 0)) for i in range(len(rest))] == [whole.load(i).getpixel((0, 0)) for i in kept]
    assert rest.class_names == ["a", "b"]
    with pytest.raises(IndexError, match=rf"images 0\.\.{len(kept) - 1}"):
        rest.describe(len(kept))


def test_training_takes_every_image_but_the_listed_ones(tmp_path: Path) -> None:
    paths = _images(tmp_path / "images")
    file = _list(tmp_path / "list.txt", "# bad", paths[1], "", paths[4])
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS=0", "SOLVER.IMS_PER_BATCH=4", "MODEL.DEVICE=cpu"])
    cfg.DATASETS.TRAIN, cfg.DATASETS.QUARANTINE = (f"folder:{tmp_path / 'images'}",), (file,)
    loader = build_train_loader(cfg)
    stream = loader.dataset
    seen = [stream.dataset.describe(stream.index_at(p)) for p in next(iter(loader.batch_sampler))]
    assert sorted(seen) == [path for i, path in enumerate(paths) if i not in (1, 4)]  # a pass of four


def test_a_name_matches_character_for_character(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = _images(tmp_path / "images")
    images = ImageFolder(str(tmp_path / "images"))
    near_misses = [
        paths[0] + " ",
        paths[1].upper(),
        os.path.relpath(paths[2]),
        paths[3].replace("/b/", "/b/./"),
        "5.png",
    ]
    file = _list(tmp_path / "list.txt", *near_misses, paths[5])
    with caplog.at_level(logging.INFO, logger="dinoengine"):
        rest = without_quarantined(images, (file,))
    assert [rest.describe(i) for i in range(len(rest))] == paths[:5]
    assert "(6 name(s) in 1 file(s)) leaves out 1 of 6 images" in caplog.text
    assert "5 of the names" in caplog.text
    assert caplog.text.count("\n  ") == 3  # the first three
    assert paths[0] in caplog.text  # how a name looks


def test_several_lists_over_several_datasets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = _images(tmp_path / "images")
    both = ConcatImageDataset([ImageFolder(str(tmp_path / "images")), Synthetic(num_images=3, size=8)])
    name = both.describe(7)
    rest = without_quarantined(both, (_list(tmp_path / "1", paths[0], name), _list(tmp_path / "2", paths[0], paths[2])))
    assert isinstance(rest, ConcatImageDataset)
    assert [len(part) for part in rest.datasets] == [4, 2]
    assert "no image" not in caplog.text  # every name was met


def test_no_list_no_wrapper() -> None:
    dataset = Synthetic(num_images=3, size=8)
    assert without_quarantined(dataset, ()) is dataset


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    dataset = Synthetic(num_images=2, size=8)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt \(DATASETS\.QUARANTINE\) does not exist"):
        without_quarantined(dataset, (str(tmp_path / "nowhere.txt"),))
    everything = _list(tmp_path / "all.txt", dataset.describe(0), dataset.describe(1))
    with pytest.raises(ValueError, match="leaves out all 2 images"):
        without_quarantined(dataset, (everything,))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    strange = os.fsdecode(b"/p/\xff \xc3\xa4.jpg")
    file = str(tmp_path / "list.txt")
    impossible = write_quarantine(
        file, [("bad", ["/p/a=b c.jpg", strange, "/p/two\nlines.jpg"]), ("leak", ["/p/a=b c.jpg", "/p/2.jpg", "#1"])]
    )
    assert impossible == ["/p/two\nlines.jpg", "#1"]
    assert read_quarantine(file) == {"/p/a=b c.jpg", strange, "/p/2.jpg"}
    assert Path(file).read_bytes() == b"# bad\n/p/a=b c.jpg\n" + os.fsencode(strange) + b"\n# leak\n/p/2.jpg\n"


def test_lists_of_windows_editors_are_read(tmp_path: Path) -> None:
    assert read_quarantine(_list(tmp_path / "list", "/p/1.jpg\r", "\r", "/p/2.jpg\r")) == {"/p/1.jpg", "/p/2.jpg"}


def test_batches_are_the_same_with_and_without_a_list_of_other_names(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(
        ["DATASETS.TRAIN=synthetic:num_images=5:size=12", "DATALOADER.NUM_WORKERS=0", "SOLVER.IMS_PER_BATCH=4"]
    )
    cfg.MODEL.DEVICE = "cpu"

    def positions() -> list[list[int]]:
        loader = build_train_loader(cfg)
        return [[loader.dataset.index_at(p) for p in part] for part in islice(loader.batch_sampler, 3)]

    usual = positions()
    cfg.DATASETS.QUARANTINE = (_list(tmp_path / "list", "nothing"),)
    assert positions() == usual


def test_an_image_is_no_list(tmp_path: Path) -> None:
    (path,) = _images(tmp_path, 1)
    with pytest.raises(ValueError, match=r"^The quarantine list \(DATASETS\.QUARANTINE\) .*0\.png is no text"):
        without_quarantined(ImageFolder(str(tmp_path)), (path,))
