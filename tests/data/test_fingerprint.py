"""What counts for a fingerprint and what does not, of arrays, files and every dataset that has one."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data import ConcatImageDataset, Synthetic, build_dataset
from dinoengine.data import fingerprint as module
from dinoengine.data.fingerprint import file_fingerprint, fingerprint
from dinoengine.data.quarantine import RemainingImages


def test_parts_do_not_run_into_each_other() -> None:
    a = np.arange(6, dtype=np.int32)
    different = [
        (a,), (a.astype(np.int64),), (a.reshape(2, 3),), (a[:3], a[3:]), (a[::-1],), (a.tobytes().decode("latin-1"),),
        ("ab",), ("a", "b"), ("", "ab"), (None, "ab"), (None,), ("",), (),
    ]  # fmt: skip
    assert len({fingerprint(*parts) for parts in different}) == len(different)
    assert fingerprint(a[::-1], "\udcff") == fingerprint(a[::-1].copy(), "\udcff")


def test_a_large_file_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 64)
    monkeypatch.setattr(module, "NUM_BLOCKS", 4)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 16)
    path = tmp_path / "weights.pth"
    content = bytearray(range(200))
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))  # type: ignore[func-returns-value]

    def of(data: bytes) -> str | None:
        path.write_bytes(data)
        return file_fingerprint(str(path))

    whole = of(content)
    assert read == [16] * 4
    assert whole not in {of(content[:-1]), of(b"x" + content[1:]), of(content[:-1] + b"x")}
    assert whole == of(content[:20] + b"x" + content[21:]), "this byte is between the blocks"
    small = content[:64]
    assert len({of(small[:i] + b"\xff" + small[i + 1 :]) for i in range(64)} | {of(small)}) == 65


def test_of_a_folder_names_and_contents_count(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    first = file_fingerprint(str(folder))
    (folder / "a").rename(folder / "b")
    second = file_fingerprint(str(folder))
    (folder / "b").write_text("2")
    assert len({first, second, file_fingerprint(str(folder))}) == 3
    assert file_fingerprint(str(tmp_path / "none")) is None
    assert file_fingerprint("s3://bucket/weights.pth") is None


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOENGINE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    for name in ("n1/n1_1.png", "n1/n1_2.png", "n2/n2_1.png"):
        _picture(root / "train" / name)
    (root / "l.csv").write_text("path,label\ntrain/n1/n1_1.png,x\ntrain/n2/n2_1.png,y\n")
    with tarfile.open(root / "c.tar", "w") as tar:
        tar.add(root / "train" / "n1" / "n1_1.png", "1.png")
    shutil.copytree(root / "train", root / "images")
    shutil.copytree(root / "train", root / "masks")
    (root / "classes.txt").write_text("a\nb\n")
    return root


TEXTS = ["folder:{}/train", "ImageNet:root={}", "ImageNet:root={}:extra={}/extra", "list:{}/l.csv", "wds:{}/c.tar", "ImageNet22k:root={}", "masks:{}"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_the_place_of_a_dataset_does_not_count(text: str, root: Path, tmp_path: Path) -> None:
    here = build_dataset(text.replace("{}", str(root))).fingerprint()
    assert here is not None
    assert here == build_dataset(text.replace("{}", str(root))).fingerprint()
    shutil.copytree(root, tmp_path / "moved")
    assert here == build_dataset(text.replace("{}", str(tmp_path / "moved"))).fingerprint()


def test_how_images_in_shards_are_encoded_does_not_count(tmp_path: Path) -> None:
    found = set()
    for quality in (95, 30):
        for name in ("1", "2"):
            Image.effect_noise((32, 32), 50).save(tmp_path / f"{name}.jpg", quality=quality)
        with tarfile.open(tmp_path / f"{quality}.tar", "w") as tar:
            for name in ("1.jpg", "2.jpg"):
                tar.add(tmp_path / name, name)
        found.add(build_dataset(f"wds:{tmp_path}/{quality}.tar").fingerprint())
    assert len(found) == 1


def test_another_name_order_or_label_counts(root: Path) -> None:
    folder, listed = f"folder:{root}/train", f"list:{root}/l.csv"
    before = build_dataset(folder).fingerprint()
    (root / "train" / "n2" / "n2_1.png").rename(root / "train" / "n2" / "n2_2.png")
    assert build_dataset(folder).fingerprint() != before
    (root / "train" / "n2" / "n2_2.png").rename(root / "train" / "n2" / "n2_1.png")
    found = set()
    for rows in ("train/n1/n1_1.png,x\ntrain/n2/n2_1.png,y", "train/n2/n2_1.png,y\ntrain/n1/n1_1.png,x", "train/n1/n1_1.png,x\ntrain/n2/n2_1.png,z", "train/n1/n1_1.png,x\ntrain/n2/n2_1.png,x"):  # fmt: skip
        (root / "l.csv").write_text(f"path,label\n{rows}\n")
        found.add(build_dataset(listed).fingerprint())
    assert len(found) == 4


def test_which_images_are_left_out_counts_and_how_many_sets_there_are(root: Path) -> None:
    whole = build_dataset(f"folder:{root}/train")
    found = {RemainingImages(whole, left_out).fingerprint() for left_out in ([], [0], [1], [0, 1])}
    found |= {ConcatImageDataset(sets).fingerprint() for sets in ([whole], [whole, whole])}
    assert len(found) == 6
    unknown = Synthetic(num_images=2, size=8)
    assert unknown.fingerprint() is ConcatImageDataset([whole, unknown]).fingerprint() is RemainingImages(unknown, [1]).fingerprint() is None  # fmt: skip
