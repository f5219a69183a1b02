from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.config import CfgNode
from dinoengine.data import build_dataset, build_test_loader
from dinoengine.evaluation import match_label_sets, overlap, shared_images
from dinoengine.evaluation.overlap import copied_files


def _files(folder: Path, contents: dict[str, bytes]) -> list[str]:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_those_that_comparing_all_pairs_finds(seed: int, tmp_path: Path) -> None:
    """Sizes around that of the compared ends, contents that differ in a single byte at either end, or not."""
    rng = np.random.default_rng(seed)

    def content() -> bytes:
        data = np.zeros(rng.choice([0, 1, 4095, 4096, 4097, 9000]), dtype=np.uint8)
        if len(data):
            data[rng.choice([0, len(data) - 1])] = rng.integers(3)
        return data.tobytes()

    train, test = (_files(tmp_path / name, {str(i): content() for i in range(12)}) for name in ("train", "test"))
    found = copied_files(train, test)
    same = {t: [o for o in train if Path(o).read_bytes() == Path(t).read_bytes()] for t in test}
    assert found == {t: originals[0] for t, originals in same.items() if originals}


def test_a_file_under_its_own_name_is_no_copy_but_may_be_the_original_of_one(tmp_path: Path) -> None:
    a, b, c = _files(tmp_path / "all", {"a": b"same", "b": b"same", "c": b"else"})
    assert copied_files([a, c], [a, b, c]) == {b: a}
    assert copied_files([a, b, c], [a, b, c]) == {}


def test_nothing_is_read_where_sizes_differ_and_no_more_than_allowed(tmp_path: Path) -> None:
    train, test = (_files(tmp_path / name, {"x": b"1" * size}) for name, size in (("train", 5000), ("test", 5001)))
    assert copied_files(train, test, most_bytes=0) == {}
    (same,) = _files(tmp_path / "same", {"x": b"1" * 5000})
    needed = 2 * (4096 + 5000)
    assert copied_files(train, [same], most_bytes=needed) == {same: train[0]}
    assert copied_files(train, [same], most_bytes=needed - 1) is None


def _images(folder: Path, first: int, num_images: int = 3) -> str:
    (folder / "cat").mkdir(parents=True)
    for i in range(num_images):
        Image.fromarray(np.full((8, 8), 10 * (first + i), np.uint8)).save(folder / "cat" / f"{i}.png")
    return f"folder:{folder}"


def test_copies_under_other_names_are_warned_of_once(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = _images(tmp_path / "train", 0), _images(tmp_path / "test", 5)
    shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "test" / "cat" / "copy.png")
    for evaluator in ("knn", "logreg"):
        match_label_sets(tiny_cfg, evaluator, (train,), test, build_test_loader)
    (warning,) = [message for message in caplog.messages if "copies of training images" in message]
    assert warning.startswith(f"1 of 4 images of the test set '{test}' are copies of training images under other names")
    assert f"{os.path.join('test', 'cat', 'copy.png')} of" in warning
    assert os.path.join("train", "cat", "1.png") in warning


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("MOST_FILES", 5, "not looked for: 6 files are more than 5"), ("MOST_BYTES", 1, "would read more than 0 MiB")],
)
def test_what_costs_too_much_is_left_out_and_said(
    limit: str,
    value: int,
    message: str,
    tiny_cfg: CfgNode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(overlap, limit, value)
    with caplog.at_level(logging.INFO):
        match_label_sets(tiny_cfg, "knn", (_images(tmp_path / "a", 0),), _images(tmp_path / "b", 0), build_test_loader)
    assert message in caplog.text


def test_drawn_images_of_another_seed_are_other_images() -> None:
    sets = [build_dataset(f"synthetic:num_images=4:size=8:seed={seed}") for seed in (0, 1, 0)]
    assert shared_images(sets[0], sets[1]) == []
    assert len(shared_images(sets[0], sets[2])) == 4
