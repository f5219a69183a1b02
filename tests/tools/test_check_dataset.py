"""tools/check_dataset.py: its files, what it prints, and that its list is what training leaves out."""

from __future__ import annotations

import csv
import re
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dinoengine.config import read_cfg
from dinoengine.data import build_train_loader
from tests.data.pictures import picture
from tests.tools.tools import load_tool

check_dataset = load_tool("check_dataset")


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "cfg.yaml"
    file.write_text(
        "SOLVER:\n  IMS_PER_BATCH: 2\nINPUT:\n  LOCAL_CROPS:\n    NUM: 0\n  GLOBAL_CROPS:\n    SIZE_PX: [32]\n"
    )
    return str(file)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"no image")
    return folder


def test_what_it_finds_is_left_out_of_the_training(
    train: Path, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test").mkdir()
    picture(2).save(tmp_path / "test" / "t.bmp")
    out = tmp_path / "out"
    words = [f"folder:{train}", "--against", f"folder:{tmp_path / 'test'}", "--output", str(out), "--workers", "0"]
    assert check_dataset.main([*words, "--config-file", config, "--images-per-second", "1e6"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.csv", "quarantine.txt", "report.html"]
    printed = capsys.readouterr().out
    assert "4 of 5 images can be read" in printed
    assert "loader of cfg.yaml, estimated from 4 images" in printed
    assert "Too slow: the device takes 1000000 images/s" in printed
    cfg = read_cfg(
        config, ["DATASETS.TRAIN", f"folder:{train}", "DATASETS.QUARANTINE", f"('{out / 'quarantine.txt'}',)"]
    )
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_train_loader(cfg)
    stream = loader.dataset
    names = [stream.dataset.describe(stream.index_at(p)) for part in islice(loader.batch_sampler, 2) for p in part]
    assert set(names) == {str(train / f"{i}.png") for i in (0, 1, 3)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quarantine", "bad,duplicate"], "--quarantine knows bad, leaks, .* got 'duplicate'"),
        (["--distance", "9"], "0 to 6 bits; got 9"),
        (["--against", "folder:/does/not/exist"], "does not exist"),
    ],
)
def test_wrong_words_end_with_one_line(
    train: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        check_dataset.main([f"folder:{train}", "--output", str(tmp_path / "out"), "--workers", "0", *words])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)


def test_arrays_without_their_config_are_refused_not_condemned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training reads them; a list that calls them bad would leave out all of them."""
    np.save(tmp_path / "1.npy", np.zeros((8, 8, 5), dtype=np.uint16))
    with pytest.raises(SystemExit):
        check_dataset.main([f"folder:{tmp_path}:arrays=true", "--output", str(tmp_path / "out"), "--workers", "0"])
    assert "is an array. Give a --config-file with INPUT.FORMAT channels" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dataset_that_is_all_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").touch()
    check_dataset.main([f"folder:{tmp_path / 'images'}", "--output", str(tmp_path / "out"), "--workers", "0"])
    assert "0 of 1 images can be read" in capsys.readouterr().out


def test_a_manifest_of_what_is_no_file_says_so(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        picture(1).save(tmp_path / "1.png")
        tar.add(tmp_path / "1.png", "1.png")
    words = ["--output", str(tmp_path / "out"), "--workers", "0", "--config-file", config]
    check_dataset.main([f"wds:{tmp_path}/s.tar", *words])
    assert re.search(r"manifest\.csv is a table to read, and list: does not take it", capsys.readouterr().out)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_arrays_with_their_config(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    smooth = np.kron(rng.integers(0, 2000, (5, 6, count)), np.ones((8, 8, 1), dtype=int)).astype(np.uint16)
    arrays = {"0": smooth, "1": smooth.copy(), "2": smooth + np.uint16(3), "3": rng.integers(0, 4000, (40, 48, count), dtype=np.uint16)}  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    not_finite = smooth.astype(np.float32)
    not_finite[3, 3] = np.nan
    np.save(folder / "4.npy", not_finite)
    (folder / "5.npy").write_bytes((folder / "0.npy").read_bytes()[:1000])
    np.save(folder / "6.npy", np.zeros((40, 48, count + 1), dtype=np.uint16))
    (tmp_path / "cfg.yaml").write_text(
        f"INPUT: {{FORMAT: channels, VALUE_RANGE: [0, 4000], LOCAL_CROPS: {{NUM: 0}}, GLOBAL_CROPS: {{SIZE_PX: [32]}}}}\nMODEL: {{PIXEL_MEAN: {[0.5] * count}, PIXEL_STD: {[0.5] * count}}}\n"
    )
    words = ["--output", str(out), "--workers", "0", "--config-file", str(tmp_path / "cfg.yaml")]
    check_dataset.main([f"folder:{folder}:arrays=true", *words])
    printed = capsys.readouterr().out
    scaled = np.stack([a.astype(np.float64) / 4000 for a in arrays.values()])
    for name, values in (("MEAN", scaled.mean((0, 1, 2))), ("STD", scaled.std((0, 1, 2)))):
        told = re.search(rf"PIXEL_{name}: \[(.*)\]", printed)
        assert told is not None
        np.testing.assert_allclose([float(v) for v in told.group(1).split(", ")], values, atol=6e-5)
    rows = list(csv.DictReader((out / "manifest.csv").open()))
    states = ["good"] * 4 + ["not finite", "other", "other channels"]
    assert [row["state"] for row in rows] == states
    assert rows[0]["duplicate_group"] == rows[1]["duplicate_group"] != rows[2]["duplicate_group"] == ""
    near = {row["near_group"] for row in rows[:3]}
    assert near == {""} if count == 5 else len(near) == 1 and near != {""}
    assert ("near duplicates and near leaks were not looked for" in printed) == (count == 5)
    assert ("<img" in (out / "report.html").read_text()) == (count != 5)
    kept = (out / "quarantine.txt").read_text().splitlines()
    assert [line for line in kept if not line.startswith("#")] == [str(folder / f"{i}.npy") for i in (4, 5, 6)]
