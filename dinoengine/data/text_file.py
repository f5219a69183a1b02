"""Lists that users write: text, or something else that was named by mistake."""

from __future__ import annotations

import codecs
import io
import re
from typing import IO

from dinoengine.utils.file_io import is_url, read_bytes

# So much of a file is looked at to see whether it is text.
_START_BYTES = 1 << 20
# What text has none of, but for names of files; of compressed or random bytes it is a ninth.
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_MOST_CONTROL = 0.05


def open_text(path: str, encoding: str = "utf-8", *, newline: str | None = None, what: str = "") -> IO[str]:
    """A list behind a path or URL, opened for reading; bytes that are no UTF-8 become surrogates, as in names of files.

    Args:
        newline: see ``open``.
        what: before the path in messages, with a space at its end, such as "DATASETS.QUARANTINE ".

    Raises:
        ValueError: if it is no text: it holds a NUL byte, or is no UTF-8 and full of control bytes (an image, an archive,
            UTF-16).
        OSError: if it cannot be read.
    """
    if is_url(path):
        data = read_bytes(path)
        _require_text(data[:_START_BYTES], f"{what}{path}")
        return io.TextIOWrapper(io.BytesIO(data), encoding, "surrogateescape", newline)
    with open(path, "rb") as file:
        _require_text(file.read(_START_BYTES), f"{what}{path}")
    return open(path, encoding=encoding, errors="surrogateescape", newline=newline)


def _require_text(start: bytes, where: str) -> None:
    if b"\0" not in start:
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)  # the last letter may be cut off
            return
        except UnicodeDecodeError:
            if len(_CONTROL.findall(start)) <= _MOST_CONTROL * len(start):
                return
    raise ValueError(
        f"{where} is no text: it begins with the bytes {start[:8]!r}. A list is a text in UTF-8 with one name per line (or "
        "a table, .csv); is this the right file?"
    )
