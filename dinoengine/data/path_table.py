"""Many texts (paths below a folder) as two arrays, which processes can share where a list of str would be copied."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np


class PathTable:
    """Texts by index: one byte string of all of them, and where each ends.

    Forked workers share its pages (the reference counts of a list would copy them), and it takes a fraction of the memory.
    Names that are not UTF-8 survive, as in ``os.fsdecode``.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        """
        Args:
            data: [bytes] uint8.
            ends: [texts] int64, not decreasing.
        """
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> PathTable:
        encoded = [os.fsencode(text) for text in texts]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"There are texts 0..{len(self.ends) - 1}, not {index}.")
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        data, start = self.data.tobytes(), 0
        for end in self.ends.tolist():
            yield os.fsdecode(data[start:end])
            start = end
