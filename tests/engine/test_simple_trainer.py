"""The step: what is optimised, logged, clipped, accumulated, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from dinoengine.engine.simple_trainer import as_loss_terms, load_optimizer_state
from dinoengine.structures import LossTerm, LossTerms
from tests.engine.toys import ToyData, ToyModel, toy_trainer


def _weights(trainer: SimpleTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_the_step_is_the_textbook_step() -> None:
    trainer = toy_trainer(clip_grad_norm=0.05)
    trainer.train(0, 6)

    model = ToyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _, batch in zip(range(6), ToyData(), strict=False):
        loss = model(batch.as_subclass(torch.Tensor)).total()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    assert torch.equal(_weights(trainer), torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_logged_terms_add_up_to_the_total_that_was_differentiated() -> None:
    trainer = toy_trainer()
    losses = []
    original = ToyModel.forward

    def spy(self: ToyModel, x: torch.Tensor) -> LossTerms:
        terms = original(self, x)
        losses.append(terms.total().item())
        return terms

    trainer.model.forward = spy.__get__(trainer.model)  # type: ignore[method-assign]
    trainer.train(0, 4)
    rows = {name: [v for v, _ in h.values()] for name, h in trainer.storage.histories().items()}
    assert rows["total_loss"] == pytest.approx(losses)
    assert [a + b for a, b in zip(rows["loss_square"], rows["loss_abs"], strict=True)] == pytest.approx(losses)
    assert trainer.storage.names("loss") == ["loss_square", "loss_abs", "total_loss"]
    assert set(trainer.storage.names("metric")) == {"error_std", "grad_norm"}


@pytest.mark.parametrize("period", [1, 3, 100])
def test_every_iteration_is_logged_whatever_the_gather_period(period: int) -> None:
    trainer = toy_trainer(gather_metric_period=period)
    trainer.train(0, 7)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == list(range(7))
    assert [i for _, i in trainer.storage.history("data_time").values()] == list(range(7))


def test_metrics_up_to_an_error_are_kept() -> None:
    trainer = toy_trainer(ToyData(bad_iters=(5,)), gather_metric_period=100)
    with pytest.raises(FloatingPointError):
        trainer.train(0, 7)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("zero_first", [False, True])
def test_accumulation_equals_the_whole_batch(parts: int, zero_first: bool) -> None:
    whole, accumulated = toy_trainer(), toy_trainer(num_micro_batches=parts, zero_grad_before_forward=zero_first)
    whole.train(0, 5)
    accumulated.train(0, 5)
    torch.testing.assert_close(_weights(accumulated), _weights(whole), rtol=1e-5, atol=1e-6)
    assert accumulated.storage.history("total_loss").latest() == pytest.approx(
        whole.storage.history("total_loss").latest(), rel=1e-5
    )


def _fused_trainer(data: Any = None) -> SimpleTrainer:
    trainer = toy_trainer(data)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.1, weight_decay=0.3, fused=True)
    return trainer


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("make", [toy_trainer, _fused_trainer])
def test_a_bad_step_leaves_the_weights_bitwise_and_says_what_is_known(where: str, make: Any) -> None:
    trainer = make(ToyData(bad_iters=(2,) if where == "loss" else ()))
    if where == "gradient":

        def poison(t: Any) -> None:
            if t.iter == 2:
                t.model.linear.weight.grad.fill_(torch.inf)

        trainer.register_hooks([hooks.CallbackHook(after_backward=poison)])
    before: list[torch.Tensor] = []
    trainer.register_hooks([hooks.CallbackHook(before_step=lambda t: before.append(_weights(trainer).clone()))])
    with pytest.raises(FloatingPointError, match=r"not finite in iteration 2 .*total_loss=.*gradient norms: model="):
        trainer.train(0, 5)
    assert torch.equal(_weights(trainer), before[-1])


@pytest.mark.parametrize("bad_iters", [(), (0,), (2, 3)])
def test_a_step_queued_behind_the_check_is_the_step_that_waits_for_its_answer(bad_iters: tuple[int, ...]) -> None:
    """Weights, moments and counters to the bit, skipped steps among them."""
    trainers = {}
    for waits in (False, True):
        trainer = _fused_trainer(ToyData(bad_iters=bad_iters))
        skipped: list[bool] = []
        trainer.register_hooks(
            [hooks.NonFiniteGuard(2), hooks.CallbackHook(after_step=lambda t, s=skipped: s.append(t.step_skipped))]
        )
        if waits:
            trainer.register_hooks([hooks.CallbackHook(before_optimizer_step=lambda t: None)])
        assert trainer._obeys_the_check() is not waits
        trainer.train(0, 6)
        assert [i for i, was_skipped in enumerate(skipped) if was_skipped] == list(bad_iters)
        trainers[waits] = trainer
    queued, waited = trainers[False], trainers[True]
    assert torch.equal(_weights(queued), _weights(waited))
    for mine, his in zip(queued.optimizer.state.values(), waited.optimizer.state.values(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine[name], his[name]), name


def test_a_hook_that_may_look_at_weights_sees_those_before_the_step() -> None:
    trainer = _fused_trainer()
    seen: list[torch.Tensor] = []
    trainer.register_hooks(
        [
            hooks.CallbackHook(
                before_step=lambda t: seen.append(_weights(trainer).clone()),
                before_optimizer_step=lambda t: seen.append(_weights(trainer).clone()),
            )
        ]
    )
    trainer.train(0, 1)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], _weights(trainer))


def test_a_hook_that_skips_a_finite_step_must_say_so() -> None:
    class Skips(HookBase):
        sees_weights_before_step = False

        def before_optimizer_step(self) -> None:
            self.trainer.skip_optimizer_step = True  # type: ignore[attr-defined]

    trainer = _fused_trainer()
    trainer.register_hooks([Skips()])
    with pytest.raises(RuntimeError, match="sees_weights_before_step is False; set it True"):
        trainer.train(0, 1)


def test_a_model_left_in_eval_mode_is_refused() -> None:
    trainer = toy_trainer()
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: t.model.eval())])
    with pytest.raises(RuntimeError, match="left in eval mode"):
        trainer.train(0, 2)


def test_an_ending_loader_is_refused() -> None:
    trainer = toy_trainer([torch.zeros(2, 4)])
    with pytest.raises(RuntimeError, match="ended in iteration 1; it must be endless"):
        trainer.train(0, 2)


def test_reset_data_loader_starts_the_new_one() -> None:
    trainer = toy_trainer()
    trainer.train(0, 2)
    first = trainer.storage.history("total_loss").values()[0][0]
    trainer.reset_data_loader(lambda: ToyData(bad_iters=(0,)))
    with pytest.raises(FloatingPointError):
        trainer.train(2, 3)
    assert first > 0


def test_bf16_on_the_cpu_keeps_fp32_weights_and_is_close() -> None:
    amp = AMPTrainer(model := ToyModel(), ToyData(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    amp.train(0, 4)
    exact = toy_trainer()
    exact.train(0, 4)
    assert {p.dtype for p in amp.model.parameters()} == {torch.float32}
    assert not torch.equal(_weights(amp), _weights(exact))
    torch.testing.assert_close(_weights(amp), _weights(exact), rtol=0.05, atol=0.02)


def test_precisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16; got 'int8'"):
        toy_trainer(precision="int8")
    with pytest.raises(ValueError, match="fp16 needs CUDA; on the CPU set SOLVER.AMP.PRECISION to bf16"):
        toy_trainer(precision="fp16")
    with pytest.raises(ValueError, match="for fp32 use SimpleTrainer"):
        AMPTrainer(model := ToyModel(), ToyData(), torch.optim.SGD(model.parameters(), lr=0.1), precision="fp32")


class _FakeScaler:
    """What torch's GradScaler does with scale 8: an fp16 step without a GPU."""

    def __init__(self) -> None:
        self.scale_value, self.found_inf, self.steps = 8.0, False, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.scale_value

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        for grad in grads:
            grad /= self.scale_value
        self.found_inf = any(not grad.isfinite().all() for grad in grads)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.found_inf:
            optimizer.step()
            self.steps += 1

    def update(self) -> None:
        self.scale_value *= 0.5 if self.found_inf else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale_value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale_value = state["scale"]


def test_with_a_scaler_hooks_see_true_gradients_and_the_result_is_the_same() -> None:
    plain, scaled = toy_trainer(clip_grad_norm=0.05), toy_trainer(clip_grad_norm=0.05, grad_scaler=_FakeScaler())
    seen: dict[str, list[float]] = {"plain": [], "scaled": []}
    for name, trainer in (("plain", plain), ("scaled", scaled)):
        norms = seen[name]
        trainer.register_hooks(
            [hooks.CallbackHook(after_backward=lambda t, n=norms: n.append(t.model.linear.weight.grad.norm().item()))]
        )
        trainer.train(0, 3)
    assert seen["scaled"] == pytest.approx(seen["plain"])
    torch.testing.assert_close(_weights(scaled), _weights(plain))


def test_an_fp16_overflow_skips_the_step_and_is_no_error() -> None:
    scaler = _FakeScaler()
    trainer = toy_trainer(grad_scaler=scaler)
    skipped = []

    def overflow(t: Any) -> None:
        if t.iter == 1:
            t.model.linear.weight.grad.fill_(torch.inf)
            scaler.found_inf = True

    trainer.register_hooks(
        [hooks.CallbackHook(after_backward=overflow, after_step=lambda t: skipped.append(t.step_skipped))]
    )
    trainer.train(0, 3)
    assert skipped == [False, True, False]
    assert (scaler.steps, scaler.scale_value) == (2, 4.0)


def test_a_run_without_scaler_can_go_on_with_one_and_state_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    plain = toy_trainer()
    plain.train(0, 2)
    with_scaler = toy_trainer(grad_scaler=_FakeScaler())
    with_scaler.load_state_dict(plain.state_dict())
    assert "saved without fp16" in caplog.text
    assert with_scaler.optimizer.state_dict()["state"][0]["momentum_buffer"].abs().sum() > 0
    state = with_scaler.state_dict()
    state["grad_scaler"]["scale"] = 3.0
    with_scaler.load_state_dict(state)
    assert with_scaler.grad_scaler is not None
    assert with_scaler.grad_scaler.scale_value == 3.0  # type: ignore[attr-defined]


def _adamw(model: ToyModel, split: bool, **options: Any) -> torch.optim.AdamW:
    names, params = zip(*model.named_parameters(), strict=True)
    parts = [slice(0, 1), slice(1, None)] if split else [slice(None)]
    groups = [{"params": list(params[part]), "param_names": list(names[part]), "lr_mult": 0.5} for part in parts]
    return torch.optim.AdamW(groups, lr=0.1, **options)


def test_moments_are_resumed_by_name_and_hyperparameters_stay_those_of_the_config() -> None:
    first = ToyModel()
    old = _adamw(first, split=False, betas=(0.9, 0.999))
    first.linear.weight.grad = torch.full_like(first.linear.weight, 2.0)
    first.linear.bias.grad = torch.full_like(first.linear.bias, 3.0)
    old.step()
    second = ToyModel()
    new = _adamw(second, split=True, betas=(0.9, 0.95))
    load_optimizer_state(new, old.state_dict())
    assert [group["betas"] for group in new.param_groups] == [(0.9, 0.95)] * 2
    assert [group["lr_mult"] for group in new.param_groups] == [0.5, 0.5]
    for name in ("weight", "bias"):
        saved, loaded = (o.state[getattr(m.linear, name)] for o, m in ((old, first), (new, second)))
        assert torch.equal(saved["exp_avg"], loaded["exp_avg"])
        assert loaded["step"] == 1


def test_an_optimizer_state_of_other_parameters_is_refused() -> None:
    state = _adamw(ToyModel(), split=False).state_dict()
    state["param_groups"][0]["param_names"][0] = "other.weight"
    with pytest.raises(ValueError, match=r"they differ in .*other\.weight.*start a new run from its weights"):
        load_optimizer_state(_adamw(ToyModel(), split=False), state)


def test_a_metric_may_not_take_a_name_of_the_engine() -> None:
    trainer = toy_trainer()
    terms = LossTerms([LossTerm("a", trainer.model.linear.weight.sum(), 1.0)], {"grad_norm": torch.tensor(1.0)})
    trainer.model.forward = lambda batch: terms  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="metrics grad_norm have names of the engine"):
        trainer.train(0, 1)


def test_what_a_model_may_return() -> None:
    x = torch.tensor(2.0)
    terms = LossTerms([LossTerm("a", x, 3.0)])
    assert as_loss_terms(terms) is terms
    assert as_loss_terms({"loss_a": x, "b": x}).total() == 4.0
    assert [name for name, _ in as_loss_terms({"loss_a": x, "b": x}).contributions()] == ["loss_a", "loss_b"]
    assert as_loss_terms(x).total() == 2.0
    with pytest.raises(TypeError, match="must return LossTerms, a dict of scalar losses, or a scalar; got tuple"):
        as_loss_terms((x,))  # type: ignore[arg-type]


def test_the_step_seed_makes_a_step_a_function_of_its_iteration() -> None:
    def draws(start: int, stop: int, seed: int | None) -> list[float]:
        trainer = toy_trainer(seed=seed)
        got: list[float] = []
        trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: got.append(torch.rand(()).item()))])
        trainer.train(start, stop)
        return got

    assert draws(0, 5, 7)[3:] == draws(3, 5, 7)
    assert draws(0, 2, 7) != draws(0, 2, 8)


def test_groups_are_clipped_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

        def clip_groups(self) -> dict[str, list[nn.Parameter]]:
            return {"a": [self.a], "b": [self.b]}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (100 * self.a + 0.5 * self.b).sum()

    model = Two()
    trainer = SimpleTrainer(model, ToyData(), torch.optim.SGD(model.parameters(), lr=1.0), clip_grad_norm=1.0)
    trainer.train(0, 1)
    assert {k: round(v.item(), 4) for k, v in trainer.grad_norms.items()} == {"a": 100.0, "b": 0.5}
    torch.testing.assert_close(model.a.detach(), torch.tensor([0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.b.detach(), torch.tensor([0.5]), atol=1e-6, rtol=0)
    assert trainer.storage.history("grad_norm").latest() == pytest.approx((100**2 + 0.5**2) ** 0.5)
