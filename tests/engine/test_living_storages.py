"""What is alive is counted, once."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from dinoengine.engine.living_storages import LivingStorages


def test_what_is_alive_counts_once_and_what_was_there_not_at_all() -> None:
    weight = torch.ones(4, 8)
    with LivingStorages([weight]) as storages:
        made = torch.zeros(16)  # 64 bytes
        views = [made[:3], made.view(4, 4), weight.t()]
        grown = torch.cat([made, made])  # 128 bytes
        assert storages.num_bytes() == 64 + 128
        del grown
        assert storages.num_bytes() == 64
        del made, views
        assert storages.num_bytes() == 0


def test_a_checkpointed_function_keeps_its_input_alone() -> None:
    x = torch.randn(100, requires_grad=True)
    with LivingStorages([x]) as storages:
        y = checkpoint(lambda t: t.exp().sin().sum(), x.exp(), use_reentrant=False)
    assert storages.num_bytes() == 4 * (100 + 1)
    y.backward()
