"""What a computation leaves in memory, by watching every operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LivingStorages(TorchDispatchMode):
    """Within it, notes the storage of each tensor that an operator returns, without keeping it alive.

    Unlike hooks on saved tensors it also sees what activation checkpointing keeps. Views count once, as their storage.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """
        Args:
            known: tensors that were there before; views of them count nothing.
        """
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                # A storage that is gone keeps its address as long as there is a weak reference: none is taken for another.
                if reference.cdata not in self._known:
                    self._sizes[reference.cdata] = (reference, storage.nbytes())
        return outputs

    def num_bytes(self) -> int:
        """Bytes of those that are still alive."""
        return sum(size for reference, size in self._sizes.values() if not reference.expired())
