"""Reading from the device without waiting for what is queued behind."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to host memory; work that is queued on the device after this does not delay it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # to pinned memory
        self._is_there = torch.cuda.Event() if tensor.is_cuda else None
        if self._is_there is not None:
            self._is_there.record()

    def wait(self) -> Tensor:
        """The tensor, on the host."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._copy
