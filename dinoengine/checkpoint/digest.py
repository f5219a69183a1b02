"""A hash of what a checkpoint holds, whatever file it lies in."""

from __future__ import annotations

import hashlib
import struct
from typing import Any, Protocol

import torch
from torch import Tensor


class Hash(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: Any, /) -> None: ...


def content_digest(data: Any) -> str:
    """SHA-256 (hexadecimal) of nested dicts, lists, tuples, plain values and tensors.

    Names, types, shapes, order in lists and every bit of every value count; the order of entries in a dict, devices and
    strides do not. Every part is written with its kind and length, so no two contents are written alike. Tensors are read
    where they are: nothing is copied but what lies on a GPU or is not contiguous, one tensor at a time.

    Raises:
        TypeError: names the entry that is none of these, which could not be read back either.
    """
    digest = hashlib.sha256()
    _update(digest, data, ())
    return digest.hexdigest()


def update_with_tensor(digest: Hash, tensor: Tensor) -> None:
    """Shape, dtype and bytes of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)


def _update(digest: Hash, value: Any, path: tuple[str, ...]) -> None:
    kind = type(value)
    if isinstance(value, Tensor):
        digest.update(b"t")
        update_with_tensor(digest, value)
    elif isinstance(value, dict):
        digest.update(b"d%d;" % len(value))
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _update(digest, key, (*path, "key"))
            _update(digest, value[key], (*path, str(key)))
    elif kind in (list, tuple, torch.Size):
        digest.update(b"%s%d;" % (b"l" if kind is list else b"u", len(value)))
        for i, item in enumerate(value):
            _update(digest, item, (*path, str(i)))
    elif kind is float:
        digest.update(b"f" + struct.pack("<d", value))  # -0.0 and every NaN as they are
    elif value is None or kind in (bool, int, str):
        content = str(value).encode("utf-8", "surrogatepass")
        digest.update(b"%s%d;" % (kind.__name__.encode(), len(content)))
        digest.update(content)
    else:
        raise TypeError(
            f"{'.'.join(path) or 'The content'} is a {kind.__module__}.{kind.__name__}; a checkpoint holds tensors, dicts, "
            "lists, tuples, str, int, float, bool and None, as nothing else is read back without running code."
        )
