"""What tools/build_index.py does."""

from __future__ import annotations

import time

from dinoengine.data.catalog import build_dataset
from dinoengine.data.datasets import ImageNet
from dinoengine.utils.printable import printable


def build_index(text: str, *, dump_extra: bool = False) -> str:
    """Make a dataset, with it its index, and tell about both.

    Args:
        dump_extra: also write the files of the published code into its ``extra``.

    Raises:
        ValueError: for ``dump_extra`` with a dataset that is not ImageNet; otherwise as ``build_dataset``.
    """
    start = time.monotonic()
    dataset = build_dataset(text)
    seconds = time.monotonic() - start
    classes = "no labels" if dataset.class_names is None else f"{len(dataset.class_names):,} classes"
    kept = ", ".join(dataset.index_files) or "none is kept"
    lines = [f"{text}: {len(dataset):,} images, {classes}, in {seconds:.1f} s; index: {kept}"]
    if dump_extra:
        if not isinstance(dataset, ImageNet):
            raise ValueError(f"--dump-extra writes the index files of ImageNet:...; {text!r} is none.")
        lines += [f"  wrote {file}" for file in dataset.dump_extra()]
    return "\n".join(map(printable, lines))
