from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoengine.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    KNNEvaluator,
    inference_context,
    inference_on_dataset,
)
from dinoengine.evaluation import evaluator as evaluator_module
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import logger as logger_module
from tests.evaluation.fakes import LinearFeatures, identity_features, make_loader


class Recorder(DatasetEvaluator):
    """Writes down every call, and what it could see at that time."""

    def __init__(self, results: dict[str, Any] | None = None, fail_in: str = "") -> None:
        self.results = results
        self.fail_in = fail_in
        self.calls: list[Any] = []

    def _note(self, name: str, *seen: Any) -> None:
        self.calls.append((name, *seen))
        if name == self.fail_in:
            raise RuntimeError(f"failed in {name}")

    def prepare(self, model: nn.Module) -> None:
        self._note("prepare", model.training, torch.is_grad_enabled())

    def reset(self) -> None:
        self._note("reset")

    def process(self, batch: ImageBatch, output: BackboneOutput) -> None:
        self._note("process", batch.indices.tolist(), output.cls_token.tolist(), output.cls_token.requires_grad)

    def evaluate(self) -> dict[str, Any] | None:
        self._note("evaluate")
        return self.results


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _mixed_modes() -> LinearFeatures:
    """In training, but for a part that its owner froze."""
    model = LinearFeatures(torch.eye(2)).train()
    model.frozen_norm.eval()
    return model


# --- the order of calls ------------------------------------------------------------------------------------------


def test_calls_come_in_order_with_every_batch_once() -> None:
    recorder = Recorder({"task": {"metric": 1.0}})
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    results = inference_on_dataset(LinearFeatures(torch.eye(2)).train(), make_loader(rows, None, 2), recorder)
    assert recorder.calls == [
        ("reset",),
        ("prepare", False, False),
        ("process", [0, 1], [[1.0, 2.0], [3.0, 4.0]], False),  # dropout is off: eval mode
        ("process", [2], [[5.0, 6.0]], False),
        ("evaluate",),
    ]
    assert results == {"task": {"metric": 1.0}}


def test_an_evaluator_without_results_gives_an_empty_dict() -> None:
    loader = make_loader(torch.zeros(2, 2), None)
    assert inference_on_dataset(identity_features(2), loader, Recorder(None)) == {}
    assert inference_on_dataset(identity_features(2), loader, DatasetEvaluator()) == {}


def test_a_list_of_evaluators_shares_one_pass() -> None:
    passes = 0

    class Counting(LinearFeatures):
        def forward(self, images: Tensor) -> BackboneOutput:
            nonlocal passes
            passes += 1
            return super().forward(images)

    first, second = Recorder({"a": {"x": 1.0}}), Recorder({"b": {"x": 2.0}})
    results = inference_on_dataset(Counting(torch.eye(2)), make_loader(torch.rand(5, 2), None, 2), [first, second])
    assert results == {"a": {"x": 1.0}, "b": {"x": 2.0}}
    assert first.calls == second.calls
    assert passes == 3


def test_evaluating_twice_starts_afresh() -> None:
    rows, labels = torch.eye(4), torch.tensor([0, 1, 0, 1])
    evaluator = KNNEvaluator(make_loader(rows, labels), ks=[1])
    model, loader = identity_features(4), make_loader(rows, labels)
    first = inference_on_dataset(model, loader, evaluator)
    assert inference_on_dataset(model, loader, evaluator) == first == {"knn": {"top1_k1": 100.0}}
    with torch.no_grad():
        model.weight.mul_(torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None])  # all but the first image look the same now
    assert inference_on_dataset(model, loader, evaluator) != first


def test_batches_go_to_the_device_of_the_model() -> None:
    seen: list[Any] = []

    class Travelling(ImageBatch):
        def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
            seen.append(device)
            return super().to(device, non_blocking)

    batch = Travelling(torch.zeros(1, 1, 1, 2), None, torch.tensor([0]))
    inference_on_dataset(identity_features(2), [batch], Recorder())
    assert seen == [torch.device("cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_cuda_gives_the_results_of_the_cpu() -> None:
    rows, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    loader = make_loader(rows, labels)
    results = [
        inference_on_dataset(identity_features(4).to(device), loader, KNNEvaluator(loader, ks=[1, 3]))
        for device in ("cpu", "cuda")
    ]
    assert results[0] == results[1]


# --- modes and gradients -----------------------------------------------------------------------------------------


def test_context_is_eval_mode_without_gradient_and_gives_every_module_its_mode_back() -> None:
    model = _mixed_modes()
    before = _modes(model)
    assert len(set(before)) == 2
    with inference_context(model):
        assert not any(_modes(model))
        assert not model(torch.zeros(1, 1, 1, 2)).cls_token.requires_grad
    assert _modes(model) == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_context_of_a_model_in_eval_mode_leaves_it_there() -> None:
    model = identity_features(2)
    with inference_context(model):
        pass
    assert not any(_modes(model))


@pytest.mark.parametrize("fail_in", ["prepare", "process", "evaluate"])
def test_an_error_leaves_the_model_as_it_was(fail_in: str) -> None:
    model = _mixed_modes()
    before = _modes(model)
    with pytest.raises(RuntimeError, match=f"failed in {fail_in}"):
        inference_on_dataset(model, make_loader(torch.zeros(3, 2), None), Recorder(fail_in=fail_in))
    assert _modes(model) == before
    assert torch.is_grad_enabled()


def test_training_goes_on_after_an_evaluation() -> None:
    model = LinearFeatures(torch.eye(2))
    rows = torch.rand(3, 2)
    inference_on_dataset(model, make_loader(rows, torch.zeros(3, dtype=torch.int64)), Recorder())
    model(rows[:, None, None]).cls_token.sum().backward()
    assert model.weight.grad is not None


# --- several evaluators ------------------------------------------------------------------------------------------


def test_two_evaluators_may_not_report_the_same_task() -> None:
    both = DatasetEvaluators([Recorder({"knn": {"a": 1.0}}), Recorder({"knn": {"b": 2.0}})])
    with pytest.raises(ValueError, match="Two evaluators report results under 'knn'; rename one"):
        both.evaluate()


def test_evaluators_without_results_are_passed_over() -> None:
    both = DatasetEvaluators([Recorder(None), Recorder({"knn": {"a": 1.0}}), Recorder({})])
    assert both.evaluate() == {"knn": {"a": 1.0}}
    assert DatasetEvaluators([]).evaluate() == {}


# --- the log -----------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages of an evaluation of 100 batches of one second each, on a clock of our own."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(evaluator_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(logger_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(logger_module, "_last_times", {})

    class Slow(LinearFeatures):
        def forward(self, images: Tensor) -> BackboneOutput:
            clock.now += 1.0
            return super().forward(images)

    logger = logging.getLogger("dinoengine.evaluation")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, "dinoengine.evaluation")
    inference_on_dataset(Slow(torch.eye(1)), make_loader(torch.zeros(200, 1), None, batch_size=2), Recorder())
    return caplog.messages


def test_the_log_says_how_long_it_will_take_and_how_long_it_took(slow_run: list[str]) -> None:
    assert slow_run[0] == "Evaluating ... about 0:01:39 left"
    assert slow_run[-1] == "Evaluated 200 images on 1 process(es) in 100.0 s (forward 100.0 s, metrics 0.0 s)."


def test_the_log_is_not_flooded(slow_run: list[str]) -> None:
    assert len(slow_run) <= 12  # about one line in ten seconds
