"""How often a training step makes the host wait for the device.

There is no GPU in most machines that run this, so what would wait is looked for where it can be seen on the CPU as well: the
operators that hand a value or a data-dependent shape to Python, and the methods that copy a tensor to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinoengine.config import CfgNode
from dinoengine.engine import HookBase, SSLTrainer
from dinoengine.engine.device_batches import DeviceBatches

_WAITING_OPERATORS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"),
    *("aten::_unique2", "aten::repeat_interleave", "aten::item"),
}
_WAITING_METHODS = ("tolist", "cpu", "numpy")


class _Watch(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        is_mask = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in _WAITING_OPERATORS or is_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of what waited, in order."""
    seen: list[str] = []
    with monkeypatch.context() as patch, _Watch(seen):
        for name in _WAITING_METHODS:
            original = getattr(Tensor, name)

            def watched(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                seen.append(_name)
                return _original(self, *args, **kwargs)

            patch.setattr(Tensor, name, watched)
        yield seen


class _WatchIterations(HookBase):
    """Iterations 2 and 3, with the hooks of all others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._watch = _waits(monkeypatch)
        self.seen: list[str] = []

    def before_step(self) -> None:
        if self.trainer.iter == 2:
            self.seen = self._watch.__enter__()

    def after_step(self) -> None:
        if self.trainer.iter == 3:
            self._watch.__exit__(None, None, None)


def _trainer(cfg: CfgNode, *overrides: Any) -> SSLTrainer:
    cfg.merge_from_list(
        [*("MODEL.VIT.DROP_PATH_RATE", 0.3, "MODEL.VIT.DEPTH", 2, "LOG.PERIOD", 1000, "SOLVER.MAX_ITER", 6), *overrides]
    )
    cfg.DATASETS.TEST = ()
    trainer = SSLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer._batches = DeviceBatches(trainer.data_loader, trainer.device)
    fetched = trainer._batches.fetch(0)  # loading and the copy to the device belong to the host
    trainer._batches.fetch = lambda iteration: fetched  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("MODEL.LOSS.CENTERING", "sinkhorn_knopp", "MODEL.IBOT_HEAD.SEPARATE", True),
        ("SOLVER.NUM_MICRO_BATCHES", 2),
        ("SOLVER.AMP.ENABLED", True, "MODEL.ACTIVATION_CHECKPOINTING", "full"),
    ],
)
def test_a_step_waits_once_for_the_finite_check_and_for_nothing_else(
    tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, overrides: tuple[Any, ...]
) -> None:
    trainer = _trainer(tiny_cfg, *overrides)
    watch = _WatchIterations(monkeypatch)
    trainer.register_hooks([watch])
    trainer.train()
    assert trainer._obeys_the_check()  # the device has the optimizer's work by then
    # The one reading per step without which a step that is not finite could not be refused before the weights change.
    assert watch.seen == ["tolist", "tolist"]


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.cpu()]
)
def test_the_watch_sees_what_waits(monkeypatch: pytest.MonkeyPatch, wait: Any) -> None:
    with _waits(monkeypatch) as seen:
        wait(torch.ones(3))
    assert seen
