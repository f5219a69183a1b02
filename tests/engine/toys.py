"""Small models, data and hooks for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.engine import HookBase, SimpleTrainer, TrainerBase
from dinoengine.structures import LossTerm, LossTerms


class ToyModel(nn.Module):
    """Regression to the mean of its input, with two loss terms; both are means over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        with torch.no_grad():
            self.linear.weight.fill_(0.5)
            self.linear.bias.fill_(0.1)

    def forward(self, x: Tensor) -> LossTerms:
        error = self.linear(x) - x.mean(1, keepdim=True)
        return LossTerms(
            [LossTerm("square", error.square().mean(), 2.0), LossTerm("abs", error.abs().mean(), 0.5)],
            {"error_std": error.detach().std()},
        )


class Parts(Tensor):
    """A batch that can be split, as SSLBatch can."""

    def split(self, num: int) -> Any:  # type: ignore[override]
        return [x.as_subclass(Tensor) for x in self.as_subclass(Tensor).chunk(num)]


class ToyData:
    """Endless batches that depend on the iteration alone; ``bad_iters`` are NaN."""

    def __init__(self, batch_size: int = 8, bad_iters: tuple[int, ...] = ()) -> None:
        self.batch_size = batch_size
        self.bad_iters = bad_iters

    def __iter__(self) -> Iterator[Tensor]:
        iteration = 0
        while True:
            batch = torch.randn(self.batch_size, 4, generator=torch.Generator().manual_seed(iteration))
            yield (batch * torch.nan if iteration in self.bad_iters else batch).as_subclass(Parts)
            iteration += 1


class OverflowingScaler:
    """A scaler whose gradients are never finite."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss * torch.inf

    def unscale_(self, optimizer: object) -> None: ...
    def step(self, optimizer: object) -> None: ...
    def update(self) -> None: ...


def toy_trainer(data: Any = None, lr: float = 0.1, **options: Any) -> SimpleTrainer:
    model = ToyModel()
    return SimpleTrainer(model, data or ToyData(), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **options)


class IdleTrainer(TrainerBase):
    """A loop whose step does nothing, or fails at one iteration."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.error = error or RuntimeError("step failed")

    def run_step(self) -> None:
        if self.iter == self.fail_at:
            raise self.error


class Recorder(HookBase):
    """Writes down every call."""

    def __init__(self, calls: list[str], label: str = "a") -> None:
        self.calls = calls
        self.label = label

    def _note(self, point: str) -> None:
        self.calls.append(f"{self.label}.{point}@{self.trainer.iter}")

    def before_train(self) -> None:
        self._note("before_train")

    def after_train(self) -> None:
        self._note("after_train")

    def before_step(self) -> None:
        self._note("before_step")

    def after_backward(self) -> None:
        self._note("after_backward")

    def before_optimizer_step(self) -> None:
        self._note("before_optimizer_step")

    def after_step(self) -> None:
        self._note("after_step")


class Counter(HookBase):
    """A hook with state."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.count = 0

    @property
    def name(self) -> str:
        return self._name

    def after_step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
