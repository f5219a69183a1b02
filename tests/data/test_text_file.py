from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoengine.data.text_file import open_text


def _picture(kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _picture("JPEG"),
        _picture("PNG"),
        gzip.compress(b"a.png\n" * 1000, mtime=1 << 30).replace(b"\0", b"\1"),
        np.random.default_rng(0).integers(1, 256, 4000, dtype=np.uint8).tobytes(),
        "a.png\n".encode("utf-16"),
    ],
    ids=["JPEG", "PNG", "compressed", "noise without NUL", "UTF-16"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^The list .*list\.txt is no text: it begins with the bytes b'.*UTF-8"):
        open_text(str(path), what="The list ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"/data/a.png\r\n",
        "/data/日本語.png\n".encode() * 50_000,  # a letter is cut where the look ends
        "/data/é.png\n".encode("latin-1"),
        b"\xff\x01.png\n/data/photos/1.png\n/data/photos/2.png\n",  # our own list of a hostile name
        b"\x1b[2J\x07.png\n",
    ],
)
def test_names_in_any_bytes_are_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with open_text(str(path), newline="\n") as file:
        assert os.fsencode(file.read()) == content
