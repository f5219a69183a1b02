"""The page: whole HTML, nothing from elsewhere, names escaped, and the numbers it stands for."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.config import get_cfg
from dinoengine.data import ImageFolder, build_dataset
from dinoengine.data.check_report import Page, pixel_statistics, render_page
from dinoengine.data.dataset_check import Inspected, find_duplicates, find_leaks, inspect_dataset
from dinoengine.data.dataset_findings import Limits, findings_of
from tests.data.pictures import picture


class _Reader(HTMLParser):
    """What is in a page; an end tag without its start is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def _page(mine: Inspected, other: Inspected | None = None) -> str:
    duplicates = find_duplicates(mine, 4)
    leaks = None if other is None else find_leaks(mine, other, 4)
    found = findings_of(mine, duplicates, leaks, Limits())
    page = Page("folder:<mine>", "folder:other" if other else "", ["7 images/s & more"], ("bad", "leaks"))
    return render_page(page, mine, found, duplicates, leaks, other)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    picture(0).save(folder / "0<b>.png")
    picture(0).save(folder / "1&.bmp")
    picture(1).save(folder / "2.png")
    picture(1).resize((100, 75)).save(folder / "3.png")
    picture(2).convert("CMYK").save(folder / "4.jpg")
    with open(os.fsencode(folder) + b"/5\xff.png", "wb"):
        pass
    Image.new("L", (20, 20)).save(folder / "6.png")
    return folder


def test_the_page_is_whole_and_needs_nothing_else(train: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    picture(2).save(tmp_path / "test" / "t.png")
    picture(0).save(tmp_path / "test" / "u.png")
    text = _page(inspect_dataset(ImageFolder(str(train)), 0), inspect_dataset(ImageFolder(str(tmp_path / "test")), 0))
    assert text.isascii()
    page = _Reader(text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert page.headings == [
        "Findings",
        "For the config",
        "Speed",
        "Sizes",
        "Kinds",
        "Leaks: here, and in the other dataset",
        "Near leaks: here, and in the other dataset",
        "Exact duplicates",
        "Near duplicates",
        "Blank",
        "Tiny",
    ]
    assert len(page.sources) == 2 * 2 + 2 + 2 + 2 + 1 + 1  # two leaks, one near leak, two pairs, blank, tiny
    words = " ".join(page.words)
    for expected in (
        "folder:<mine>",
        "7 images, of which 6 can be read",
        "0<b>.png",
        "1&.bmp",
        "5\\udcff.png",
        "7 images/s & more",
    ):
        assert expected in words
    assert "mode CMYK" in words
    assert "bad: empty" in words


def test_without_findings_there_are_no_pictures() -> None:
    page = _Reader(_page(inspect_dataset(build_dataset("synthetic:num_images=4:size=40"), 0)))
    assert page.sources == []
    assert page.headings == ["Findings", "For the config", "Speed", "Sizes", "Kinds"]


def test_a_dataset_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    page = _Reader(_page(inspect_dataset(ImageFolder(str(tmp_path)), 0)))
    assert "no image can be read" in " ".join(page.words)


def test_the_statistics_can_be_copied_into_a_config(train: Path, tmp_path: Path) -> None:
    inspected = inspect_dataset(ImageFolder(str(train)), 0)
    file = tmp_path / "cfg.yaml"
    file.write_text(pixel_statistics(inspected))
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    np.testing.assert_allclose(cfg.MODEL.PIXEL_MEAN, inspected.mean, atol=5.1e-5)
    np.testing.assert_allclose(cfg.MODEL.PIXEL_STD, inspected.std, atol=5.1e-5)


def test_grey_images_get_one_channel_as_well(tmp_path: Path) -> None:
    for i in range(2):
        picture(i).convert("L").save(tmp_path / f"{i}.png")
    inspected = inspect_dataset(ImageFolder(str(tmp_path)), 0)
    rgb, grey = pixel_statistics(inspected).split("INPUT.FORMAT L:")
    assert rgb.count(f"{inspected.mean[0]:.4f}") == 3
    assert f"PIXEL_MEAN: [{inspected.mean[0]:.4f}]\n" in grey


def test_names_are_shown_as_text_whatever_they_hold(tmp_path: Path) -> None:
    (tmp_path / "<img src=x onerror=alert(1)>\x1b[2J\n&amp;.png").write_bytes(b"no image")
    inspected = inspect_dataset(ImageFolder(str(tmp_path)), 0)
    duplicates = find_duplicates(inspected, 0)
    found = findings_of(inspected, duplicates, None, Limits())
    page = render_page(Page("folder:<b>\x1b", "", [], []), inspected, found, duplicates, None, None)
    assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[2J" in page
    assert "&amp;amp;.png" in page
    assert "<img" not in page
    assert "\x1b" not in page


def test_a_bad_image_stands_there_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    inspected = inspect_dataset(ImageFolder(str(tmp_path)), 0)
    duplicates = find_duplicates(inspected, 0)
    found = findings_of(inspected, duplicates, None, Limits())
    page = render_page(Page("t", "", ["<b>\nfast"], ["bad"]), inspected, found, duplicates, None, None)
    assert f"<small>{tmp_path}/1.png: <i>the file is empty</i></small>" in page
    assert page.count("in quarantine.txt</span>") == 1, "of findings with images only"
    assert "<pre>&lt;b&gt;\nfast</pre>" in page
