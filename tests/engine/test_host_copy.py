"""A reading that later work does not delay."""

from __future__ import annotations

import pytest
import torch

from dinoengine.engine.host_copy import HostCopy


def test_a_copy_has_the_values_of_its_moment() -> None:
    tensor = torch.arange(3.0)
    copy = HostCopy(tensor.clone())
    assert torch.equal(copy.wait(), tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_does_not_wait_for_what_is_queued_behind() -> None:
    tensor = torch.arange(3.0, device="cuda")
    torch.cuda.synchronize()
    copy = HostCopy(tensor)
    tensor = tensor + 1
    torch.cuda._sleep(2 * 10**9)  # about a second
    behind = torch.cuda.Event()
    behind.record()
    assert copy.wait().tolist() == [0.0, 1.0, 2.0]
    assert not behind.query()
