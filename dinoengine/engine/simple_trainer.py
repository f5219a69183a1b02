"""One iteration of training: the ``run_step`` that every precision shares.

Order of one iteration::

    before_step hooks                      schedules set LR, weight decay, teacher temperature
    run_step:
        the batch, on the device
        forward and backward, in num_micro_batches parts; on CUDA the next batch is fetched and copied meanwhile
        unscale (fp16)  ->  after_backward hooks            gradients are complete and unscaled
        clip per sub-module, check loss and gradients on all ranks together
        before_optimizer_step hooks                         a guard may ask to skip the step
        optimizer step                                      queued before the answer of the check where it can obey that
    after_step hooks                       EMA teacher, checkpoint, evaluation, writers (always last)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.engine.device_batches import DeviceBatches
from dinoengine.engine.host_copy import HostCopy
from dinoengine.engine.optimizer_state import load_optimizer_state, optimizer_state
from dinoengine.engine.parallel import unwrap_model
from dinoengine.engine.precision import PRECISIONS
from dinoengine.engine.source_losses import SourceLosses
from dinoengine.engine.train_loop import HookBase, TrainerBase, require_parts
from dinoengine.solver.clipping import clip_grad_norms_
from dinoengine.structures import BadImage, LossTerm, LossTerms
from dinoengine.utils import comm
from dinoengine.utils.env import seed_step_rng

logger = logging.getLogger(__name__)


class SimpleTrainer(TrainerBase):
    """One model, one optimizer, one loader; single or mixed precision; gradient accumulation.

    The model maps a batch to ``LossTerms`` (or a dict of scalar losses, or one scalar). A model may offer
    ``clip_groups()`` (named parameter lists to clip apart) and ``split_batch(batch, n)`` (micro-batches that share
    what must be computed on the whole batch); otherwise all parameters are one group and ``batch.split(n)`` is used.

    Attributes:
        grad_norms: gradient norm of each clip group before clipping, of the last step.
        loss_is_finite: whether the loss of the last step was finite on every rank.
        step_is_finite: whether loss and gradients of the last step were finite on every rank.
        skip_optimizer_step: set by a hook to leave the weights alone in this step.
        step_skipped: True when the last step did not change the weights.
        flags: what this rank wishes or has seen, by name; hooks add entries in ``before_train``, the same on all ranks.
        agreed_flags: those of any rank, as of the finite check of the last step. That check is a reduction anyway, so an
            agreement costs no collective of its own.
        data_time: seconds that the last step waited for its batch.
        why_not_skipped: set by a hook: what the error of a step that is not finite ends with.
        bad_images: those that were replaced on this rank, each with its iteration, until ``hooks.BadImageLog`` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "fp32",
        grad_scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float = 0.0,
        num_micro_batches: int = 1,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        seed: int | None = None,
        source_names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            model: in training mode; possibly wrapped in DDP.
            data_loader: endless iterable of batches.
            precision: "fp32", "bf16" or "fp16" (CUDA only; makes a GradScaler if none is given).
            grad_scaler: used with fp16.
            clip_grad_norm: largest L2 norm of each clip group's gradient; 0 disables.
            num_micro_batches: parts a batch is run in.
            gather_metric_period: iterations between reading the losses back and averaging them over ranks.
            zero_grad_before_forward: True frees the gradients before the forward pass instead of after it.
            seed: if given, torch's generators are seeded at every step from (seed, iteration, rank).
            source_names: of the datasets that ``sources`` of a batch number, to log the loss of each.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.precision = precision
        self.device = next(model.parameters()).device
        if precision == "fp16" and grad_scaler is None:
            if self.device.type != "cuda":
                raise ValueError("fp16 needs CUDA; on the CPU set SOLVER.AMP.PRECISION to bf16.")
            grad_scaler = torch.amp.GradScaler("cuda")
        self.grad_scaler = grad_scaler
        self.clip_grad_norm = clip_grad_norm
        self.num_micro_batches = num_micro_batches
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.seed = seed
        self._source_losses = SourceLosses(source_names, self.device)

        self.grad_norms: dict[str, Tensor] = {}
        self.loss_is_finite = True
        self.step_is_finite = True
        self.why_not_skipped = ""
        self.skip_optimizer_step = False
        self.step_skipped = False
        self.flags: dict[str, bool] = {}
        self.agreed_flags: dict[str, bool] = {}
        self.bad_images: list[tuple[int, BadImage]] = []
        self.data_time = 0.0
        self.last_losses: dict[str, Tensor] = {}
        self._batches: DeviceBatches | None = None
        self._pending_metrics: list[tuple[int, dict[str, Tensor], dict[str, Tensor], float]] = []

    def reset_data_loader(self, builder: Callable[[], Iterable[Any]]) -> None:
        """Drop the current loader and its workers, then build another."""
        self.close_data_loader()
        del self.data_loader
        self.data_loader = builder()

    def close_data_loader(self) -> None:
        """End the loader's workers; they start anew at the next step."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def run_step(self) -> None:
        """One optimizer step; see the module docstring for the order.

        Raises:
            FloatingPointError: if loss or gradients are not finite on some rank and no hook skips the step. Weights and
                buffers are those of the step before.
            WorkerFailureError: if data workers die or hang again and again.
        """
        if not self.model.training:
            raise RuntimeError("The model was left in eval mode; call model.train() after evaluating it in a hook.")
        if self._batches is None:
            self._batches = DeviceBatches(self.data_loader, self.device)
        batch, self.data_time = self._batches.fetch(self.iter)
        self.bad_images += [(self.iter, bad) for bad in getattr(batch, "bad_images", ())]
        if self.seed is not None:  # after the batch: starting a loader draws from the generator too
            seed_step_rng(self.seed, self.iter, comm.get_rank())

        # Centres and the like, which the forward pass moves: a step that is refused leaves them as they were.
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        losses, metrics = self._forward_backward(batch)
        if self.iter + 1 < self.max_iter:
            self._batches.fetch_ahead(self.iter + 1)  # the device still computes; the check below waits for it
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        self.after_backward()
        self.grad_norms = clip_grad_norms_(self._clip_groups(), self.clip_grad_norm)

        self.last_losses = losses
        grad_norm = torch.stack([n.float() for n in self.grad_norms.values()]).square().sum().sqrt()
        answer = self._ask_if_finite(losses["total_loss"], grad_norm)
        on_host = HostCopy(answer)
        if is_stepped := self._obeys_the_check():
            self._queue_optimizer_step(answer[:2].amax())
        self._take_answer(on_host.wait())
        if not (self.step_is_finite or self.is_fp16_overflow):
            for buffer, before in buffers:
                buffer.copy_(before)
        self.before_optimizer_step()
        self._refuse_non_finite()
        self._optimizer_step(is_stepped)

        self._pending_metrics.append((self.iter, losses, {**metrics, "grad_norm": grad_norm}, self.data_time))
        self._source_losses.end_step(counts=self.loss_is_finite)
        if (self.iter + 1) % self.gather_metric_period == 0:
            self.flush_metrics()

    def _forward_backward(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the mean loss over micro-batches; returns what was optimised and the diagnostics."""
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad(set_to_none=True)
        num_parts = self.num_micro_batches
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for part_index, part in enumerate(self._split(batch)):
            is_last = part_index == num_parts - 1
            with self._gradient_sync(is_last):
                with self._autocast():
                    terms = as_loss_terms(self.model(part))
                    loss = terms.total() / num_parts
                if part_index == 0 and not self.zero_grad_before_forward:
                    self.optimizer.zero_grad(set_to_none=True)
                (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
            for name, value in [*terms.contributions(), ("total_loss", terms.total())]:
                losses[name] = losses.get(name, 0.0) + value.detach() / num_parts
            self._source_losses.add(getattr(part, "sources", None), terms.per_image)
            for name, value in terms.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() / num_parts
        if clash := metrics.keys() & {*losses, "grad_norm"}:
            raise ValueError(f"The model's metrics {', '.join(sorted(clash))} have names of the engine; rename them.")
        return losses, metrics

    def _split(self, batch: Any) -> Iterable[Any]:
        if self.num_micro_batches == 1:
            return [batch]
        split_batch = getattr(unwrap_model(self.model), "split_batch", None)
        if split_batch is None:
            return batch.split(self.num_micro_batches)
        with self._autocast():
            return split_batch(batch, self.num_micro_batches)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        # Between micro-batches DDP must not reduce: one reduction per step is both faster and exact.
        if hasattr(self.model, "set_requires_gradient_sync"):  # sharded: the same, set instead of entered
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        no_sync = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if is_last or no_sync is None else no_sync()

    def _clip_groups(self) -> dict[str, list[nn.Parameter]]:
        model = unwrap_model(self.model)
        if hasattr(model, "clip_groups"):
            return model.clip_groups()  # type: ignore[operator]
        return {"model": [p for p in model.parameters() if p.requires_grad]}

    def _ask_if_finite(self, total_loss: Tensor, grad_norm: Tensor) -> Tensor:
        """On the device, 1 or 0: whether the loss is not finite on some rank, the gradients; each of ``flags``."""
        found = [~total_loss.isfinite(), ~grad_norm.isfinite()]
        # Filled on the device: a copy from the host would wait for it.
        wishes = [total_loss.new_full((), wish, dtype=torch.bool) for wish in self.flags.values()]
        return comm.all_reduce_max(torch.stack([*found, *wishes]).float())

    def _take_answer(self, answer: Tensor) -> None:
        loss_bad, grad_bad, *agreed = answer.bool().tolist()
        self.agreed_flags = dict(zip(self.flags, agreed, strict=True))
        self.loss_is_finite = not loss_bad
        self.step_is_finite = not (loss_bad or grad_bad)
        self.skip_optimizer_step = False

    def _obeys_the_check(self) -> bool:
        """Whether the optimizer leaves everything as it is where a tensor says so, and no hook has a say before it.

        The tensor is what GradScaler gives to fused optimizers. With shares of parameters it is no public interface.
        """
        if self.grad_scaler is not None or not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return False
        if hasattr(self.model, "set_requires_gradient_sync"):
            return False
        return not any(
            hook.sees_weights_before_step and type(hook).before_optimizer_step is not HookBase.before_optimizer_step
            for hook in self._hooks
        )

    def _queue_optimizer_step(self, is_bad: Tensor) -> None:
        """Behind the check and before its answer: else the device is idle until the host has gone over all groups."""
        self.optimizer.found_inf = is_bad  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    @property
    def is_fp16_overflow(self) -> bool:
        """Whether only gradients of the last step were not finite, in fp16: the scaler skips it and lowers its scale."""
        return self.grad_scaler is not None and self.loss_is_finite and not self.step_is_finite

    def _refuse_non_finite(self) -> None:
        if not (self.step_is_finite or self.skip_optimizer_step or self.is_fp16_overflow):
            raise FloatingPointError(f"{self.describe_non_finite()}{self.why_not_skipped}")

    def describe_non_finite(self) -> str:
        """What is known about a step whose loss or gradients are not finite; the weights are untouched."""
        losses = ", ".join(f"{k}={v.item():.4g}" for k, v in self.last_losses.items())
        norms = ", ".join(f"{k}={v.item():.4g}" for k, v in self.grad_norms.items())
        return (
            f"Loss or gradients are not finite in iteration {self.iter} (this rank: {losses}; gradient norms: {norms}). "
            "The weights are those before this step. Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or allow "
            "single bad steps with SOLVER.NON_FINITE_MAX_SKIPS; tools/replay_step.py shows where it begins."
        )

    def _optimizer_step(self, is_stepped: bool) -> None:
        if is_stepped and self.skip_optimizer_step and self.step_is_finite:
            raise RuntimeError(
                "A hook skips a step that is finite, but its sees_weights_before_step is False; set it True."
            )
        if is_stepped:
            self.step_skipped = not self.step_is_finite
        elif self.skip_optimizer_step:
            self.step_skipped = True
            if self.grad_scaler is not None:
                self.grad_scaler.update()
        elif self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            self.step_skipped = not self.step_is_finite
        else:
            self.optimizer.step()
            self.step_skipped = False

    def flush_metrics(self) -> None:
        """Read the losses of the steps since the last call back, averaged over ranks (data time: the largest)."""
        pending, self._pending_metrics = self._pending_metrics, []
        if not pending:
            return
        flat = torch.stack([v.float() for _, *rows, _ in pending for row in rows for v in row.values()])
        values = iter((comm.all_reduce_sum(flat) / comm.get_world_size()).tolist())
        data_times = comm.all_reduce_max(torch.tensor([t for *_, t in pending], device=flat.device)).tolist()
        for (iteration, losses, metrics, _), data_time in zip(pending, data_times, strict=True):
            self.storage.put_scalar("data_time", data_time, cur_iter=iteration)
            for role, row in (("loss", losses), ("metric", metrics)):
                for name in row:
                    self.storage.put_scalar(name, next(values), cur_iter=iteration, role=role)
        self._source_losses.gather()
        last = pending[-1][0]
        # Not at each flush: one before a pause would be in the history of the resumed run alone.
        if (last + 1) % self.gather_metric_period == 0 or last + 1 == self.max_iter:
            means = self._source_losses.take_means()
            self.storage.put_scalars(means, smoothing_hint=False, cur_iter=last, role="metric")
        for hook in self._hooks:
            hook.after_flush()

    def finishing(self, error: BaseException | None) -> list[tuple[str, Callable[[], None]]]:
        # After an error the ranks may stand in different iterations: a collective here could hang.
        can_exchange = error is None or not comm.is_distributed()
        return [("Reading back the last metrics", self.flush_metrics)] if can_exchange else []

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["optimizer"] = optimizer_state(self.optimizer)
        state["grad_scaler"] = None if self.grad_scaler is None else self.grad_scaler.state_dict()
        state["source_losses"] = self._source_losses.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; one of a run without gradient scaler fits one with it, which then starts afresh.

        Raises:
            ValueError: if a part of the state is missing or of other parameters; names it.
        """
        require_parts(state, ("optimizer",) if self.grad_scaler is None else ("optimizer", "grad_scaler"))
        super().load_state_dict(state)
        load_optimizer_state(self.optimizer, state["optimizer"])
        self._source_losses.load_state_dict(state.get("source_losses", {}))  # older checkpoints have none
        if self.grad_scaler is None:
            if state.get("grad_scaler") is not None:
                logger.warning(
                    "The checkpoint was saved in fp16; this run has no gradient scaler, and drops that one's state."
                )
        else:
            if state["grad_scaler"] is not None:
                self.grad_scaler.load_state_dict(state["grad_scaler"])
            else:
                logger.warning("The checkpoint was saved without fp16; the gradient scaler starts afresh.")


class AMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` in mixed precision: bf16 on CPU and CUDA, fp16 with a gradient scaler on CUDA."""

    def __init__(self, *args: Any, precision: str = "bf16", **kwargs: Any) -> None:
        if precision == "fp32":
            raise ValueError("AMPTrainer takes precision bf16 or fp16; for fp32 use SimpleTrainer.")
        super().__init__(*args, precision=precision, **kwargs)


def as_loss_terms(output: LossTerms | dict[str, Tensor] | Tensor) -> LossTerms:
    """What a model returned, as LossTerms: a dict's entries are summed with weight 1, a scalar is the whole loss.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(output, LossTerms):
        return output
    if isinstance(output, dict):
        return LossTerms([LossTerm(name.removeprefix("loss_"), value, 1.0) for name, value in output.items()])
    if isinstance(output, Tensor):
        return LossTerms([LossTerm("total", output, 1.0)])
    raise TypeError(
        f"In training a model must return LossTerms, a dict of scalar losses, or a scalar; got {type(output).__name__}."
    )
