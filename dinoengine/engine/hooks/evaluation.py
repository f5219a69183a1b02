"""When to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dinoengine.engine.train_loop import HookBase
from dinoengine.evaluation import KNNEvaluator, flatten_results_dict, inference_on_dataset
from dinoengine.utils import comm


class EvaluationInterrupted(BaseException):
    """Raised within an evaluation to leave it: the run is to pause. No Exception, so that no evaluator catches it."""


class EvalHook(HookBase):
    """Calls ``evaluate()`` every ``period`` iterations and once at the end; puts its results into the storage.

    Evaluations take part in collectives: on several processes register it on all of them. The last evaluation is
    logged at iteration ``max_iter``; after an error there is none, nor a second one of the weights that a run was stopped
    with.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, Any]],
        eval_after_train: bool = True,
        eval_at_start: bool = False,
    ) -> None:
        """
        Args:
            period: iterations; 0 evaluates only at the end.
            evaluate: returns (nested) results of numbers.
            eval_at_start: also before the first iteration of a run that starts at 0; logged as iteration 0.
        """
        self.period = period
        self.evaluate = evaluate
        self.eval_after_train = eval_after_train
        self.eval_at_start = eval_at_start
        self._num_done = -1  # iterations that were done at the last evaluation

    def before_train(self) -> None:
        if self.eval_at_start and self.trainer.start_iter == 0:
            self._run()

    def catch_up(self) -> None:
        # A checkpoint is written before the evaluation of its iteration. Its history must have it nevertheless.
        self.after_step()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_due = self.period and done % self.period == 0 and done != self.trainer.max_iter
        if is_due and not self.trainer.pause_reason:  # a resumed run catches up
            self._run()
            self._num_done = done

    def after_train(self) -> None:
        if self.eval_after_train and self.trainer.succeeded and self.trainer.iter != self._num_done:
            self._run()

    def _run(self) -> None:
        self.trainer.flush_metrics()  # collective: nothing of it may be left when an evaluation is interrupted
        try:
            self.trainer.is_evaluating = True
            results = flatten_results_dict(self.evaluate() or {})
            self.trainer.is_evaluating = False  # in here: a signal between the two still leaves the evaluation
        except EvaluationInterrupted as interruption:
            self.trainer.leave_evaluation(f"{interruption}; the evaluation will be done when the run is resumed.")
            return
        finally:
            self.trainer.is_evaluating = False
        for name, value in results.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"EvalHook: an evaluation must return numbers, got {name!r} = {value!r} ({type(value).__name__})."
                ) from None
            self.trainer.storage.put_scalar(name, number, smoothing_hint=False, role="eval")
        comm.synchronize()  # fast ranks would wait in the next step anyway, counted as its time


class KNNEvalHook(EvalHook):
    """An EvalHook for scripts without a config: k-NN accuracy of a feature model on two labelled loaders."""

    def __init__(
        self,
        period: int,
        feature_model: nn.Module,
        bank_loader: Any,
        query_loader: Any,
        *,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
    ) -> None:
        """
        Args:
            feature_model: images -> BackboneOutput; shares the weights that are trained (``model.feature_model()``).
            bank_loader, query_loader: ImageBatch with labels, of this rank's part.
        """
        evaluator = KNNEvaluator(bank_loader, ks=ks, temperature=temperature)
        super().__init__(period, lambda: inference_on_dataset(feature_model, query_loader, evaluator))


class PreciseBN(HookBase):
    """Recomputes BatchNorm statistics from training batches before each evaluation; does nothing without BatchNorm.

    Register it before the checkpointer, so that checkpoints hold the precise statistics.
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Any, num_iter: int) -> None:
        """
        Args:
            period: iterations, as of the EvalHook; 0: only at the end.
            model: images -> anything; what is evaluated (a FeatureModel). A teacher's statistics are copies of the
                student's, so register it after the EMA.
            data_loader: SSLBatch; the model sees the global crops.
            num_iter: batches used.
        """
        self.period = period
        self.model = model
        self.data_loader = data_loader
        self.num_iter = num_iter
        self._has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        is_last = done == self.trainer.max_iter
        if self._has_batch_norm and (is_last or (self.period and done % self.period == 0)):
            self.update_stats()

    def update_stats(self) -> None:
        """Average the statistics of ``num_iter`` batches into the model's BatchNorm layers."""
        from fvcore.nn.precise_bn import update_bn_stats

        device = next(self.model.parameters()).device
        crops = (batch.to(device).global_crops for batch in self.data_loader)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()  # fvcore averages what BatchNorm measures in training mode
        try:
            update_bn_stats(self.model, crops, self.num_iter)
        finally:
            for module, training in modes:
                module.training = training
