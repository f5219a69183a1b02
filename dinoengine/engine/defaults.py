"""A run from a config: DefaultTrainer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dinoengine.checkpoint import Checkpointer
from dinoengine.checkpoint.pixels import warn_of_other_pixels
from dinoengine.checkpoint.resuming import FINAL, endings_of
from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader, build_train_loader
from dinoengine.engine import hooks
from dinoengine.engine.optimizer_state import load_optimizer_of
from dinoengine.engine.parallel import unwrap_model, wrap_model
from dinoengine.engine.resuming import (
    check_before_resume,
    fork_run,
    require_no_unfinished_fork,
    warn_of_lost_checkpoints,
)
from dinoengine.engine.run_sources import RunSources
from dinoengine.engine.run_writers import default_writers
from dinoengine.engine.sharding import build_sharded, gathered_model, is_to_be_sharded, training_device
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.evaluation import (
    DatasetEvaluator,
    build_evaluator,
    inference_on_dataset,
    make_record,
    print_csv_format,
    save_record,
    verify_results,
)
from dinoengine.modeling import build_model
from dinoengine.solver import OptimizerSchedule, build_lr_scheduler, build_optimizer, scale_config_to_world_size
from dinoengine.utils import comm
from dinoengine.utils.events import get_event_storage, has_event_storage
from dinoengine.utils.logger import setup_logger
from dinoengine.utils.startup import StartupTimes
from dinoengine.utils.writers import EventWriter

logger = logging.getLogger(__name__)


class DefaultTrainer(SimpleTrainer):
    """Everything a run needs, from a config. Override a ``build_*`` to change one thing.

        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()

    Attributes:
        cfg: frozen; scaled if SOLVER.REFERENCE_WORLD_SIZE asks for it.
        scheduler: sets LR and weight decay.
        checkpointer: saves the model and this trainer.
        sources: the files behind the config, compared when a run is resumed.
        startup: what the time up to the first iteration went into.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError, KeyError, FileNotFoundError: if something the config names cannot be built.
        """
        if not logging.getLogger("dinoengine").handlers:
            setup_logger(distributed_rank=comm.get_rank())
        self.startup = StartupTimes()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        data_loader = self.build_train_loader(cfg)  # first: a wrong path is found before the model is built
        self.check_evaluation(cfg)  # and what only the evaluation needs, before hours of training
        self.startup.mark("data")
        model = build_sharded(cfg, self.build_model) if is_to_be_sharded(cfg) else self.build_model(cfg)
        if cfg.MODEL.PARALLEL == "fsdp" and not is_to_be_sharded(cfg):
            logger.info("MODEL.PARALLEL fsdp: this run has one process (--num-gpus), which holds the whole model.")
        self.startup.mark("model")
        optimizer = self.build_optimizer(cfg, model)
        self.startup.mark("optimizer")
        super().__init__(
            wrap_model(cfg, model),
            data_loader,
            optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32",
            clip_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
            num_micro_batches=cfg.SOLVER.NUM_MICRO_BATCHES,
            gather_metric_period=cfg.LOG.PERIOD,
            seed=cfg.SEED,
            source_names=cfg.DATASETS.TRAIN if len(cfg.DATASETS.TRAIN) > 1 else (),
        )
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.sources = RunSources(cfg, getattr(getattr(self.data_loader, "dataset", None), "dataset", None))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            strict=cfg.MODEL.WEIGHTS_STRICT,
            metadata={"config": cfg.dump()},
            before_load=check_before_resume(cfg),
            before_weights=warn_of_other_pixels(cfg),
            on_error=cfg.SOLVER.CHECKPOINT_ON_ERROR,
            trainer=self,
        )
        self.last_results: dict[str, Any] = {}
        self.register_hooks([hooks.StartupReport(self.startup), *self.build_hooks()])

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DDP wrapper."""
        return unwrap_model(self.model)

    def resume_or_load(self, resume: bool = True, *, fork_from: str = "") -> None:
        """Continue the run in OUTPUT_DIR (``resume`` and there is one), else start from another's state or weights.

        Args:
            fork_from: folder or checkpoint of a run whose full state this one starts from (``resuming.fork_run``). Empty:
                MODEL.WEIGHTS, or from scratch.

        Raises:
            CheckpointError, FileNotFoundError: if it cannot be loaded, or there is none that every process can read.
            ConfigError: if the config has changed in what cannot change within a run.
        """
        # Of rank 0: a process that asks a moment later, or another machine, may see another folder.
        is_resumed = resume and comm.on_main_process(self.checkpointer.has_checkpoint)
        if fork_from and not is_resumed:
            self.start_iter = fork_run(self, fork_from)
        else:
            if resume and not is_resumed:
                comm.on_main_process(lambda: require_no_unfinished_fork(self.cfg.OUTPUT_DIR))
                comm.on_main_process(lambda: warn_of_lost_checkpoints(self.cfg.OUTPUT_DIR))
            self.start_iter = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
            if self.cfg.MODEL.WEIGHTS_WITH_OPTIMIZER and not is_resumed:
                load_optimizer_of(self.optimizer, self.cfg.MODEL.WEIGHTS)
        batch_sampler = getattr(self.data_loader, "batch_sampler", None)
        if batch_sampler is not None and hasattr(batch_sampler, "start_iter"):
            batch_sampler.start_iter = self.start_iter
        elif self.start_iter:
            logger.warning(
                "The training loader cannot start at iteration %d: it begins its data anew.", self.start_iter
            )
        self.startup.mark("checkpoint")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.sources.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sources.load_state_dict(state)

    def train(self) -> dict[str, Any]:  # type: ignore[override]
        """Train from ``start_iter`` to SOLVER.MAX_ITER, report, then check TEST.EXPECTED_RESULTS.

        A hook may end it earlier; such a run that is resumed trains on only if that hook would not end it again. A run that
        paused (``pause_reason``, after a signal) is saved and not evaluated.

        Returns:
            The results of the final evaluation; when nothing was left to train those that the run ended with; none when
            it paused.

        Raises:
            SystemExit: with code 1 if the results are not as expected.
        """
        was_stopped = self._was_stopped_early()
        if not was_stopped:
            super().train(self.start_iter, self.max_iter)
            if self.pause_reason:
                return {}
        if was_stopped or self.start_iter >= self.max_iter:
            self._complete_final_checkpoint()
            self.last_results = self.results_of_finished_run()
        else:
            self.report_results()
        self.check_expected_results(self.cfg, self.last_results)
        return self.last_results

    def _complete_final_checkpoint(self) -> None:
        """Write ``model_final`` if the run was killed after its last periodic checkpoint and before that one."""
        if comm.on_main_process(self.checkpointer.last_checkpoint_name) not in endings_of(FINAL) and self.start_iter:
            self.iter = self.start_iter - 1  # as in the step that would have written it
            self.checkpointer.save(FINAL, required=True, iteration=self.iter)
            self.iter = self.start_iter

    def _was_stopped_early(self) -> bool:
        """Whether the run that is resumed had stopped early and would again; says why."""
        is_resumed_within = 0 < self.start_iter < self.max_iter
        for hook in self._hooks if is_resumed_within else ():
            if isinstance(hook, hooks.EarlyStopping) and (reason := hook.reason_to_stop(self.start_iter - 1)):
                logger.info(
                    "Nothing to train: the run stopped early after iteration %d of %d: %s To go on, raise that key (or set "
                    "it to 0), or choose another TEST.BEST_METRIC.",
                    self.start_iter,
                    self.max_iter,
                    reason,
                )
                return True
        return False

    @classmethod
    def report(cls, cfg: CfgNode, results: dict[str, Any], weights: str = "") -> Any:
        """Show what ``test`` returned beside something to compare it with. Override; it has logged the results.

        Args:
            weights: the file that --eval-only evaluated; empty: the model of this run.
        """

    def report_results(self) -> None:
        """Called once with ``last_results`` set, before they are checked. Override to show or keep them."""

    def results_of_finished_run(self) -> dict[str, Any]:
        """Results of a run that has nothing left to train; this trainer keeps none, so it evaluates again."""
        return self._evaluate() if self.cfg.DATASETS.TEST else {}

    def finishing(self, error: BaseException | None) -> list[tuple[str, Callable[[], None]]]:
        # The workers would idle through the final evaluation.
        return [("Ending the data workers", self.close_data_loader), *super().finishing(error)]

    def build_hooks(self) -> list[HookBase | None]:
        """The hooks of a run, in the order they are called. Override to add or replace; writers stay last."""
        cfg = self.cfg
        period = cfg.TEST.EVAL_PERIOD
        is_main = comm.is_main_process()
        profile = cfg.LOG.PROFILE_END_ITER > 0 and is_main
        best = hooks.BestCheckpointer(self.checkpointer, cfg.TEST.BEST_METRIC, cfg.TEST.BEST_METRIC_MODE)
        patience = cfg.TEST.EARLY_STOPPING_PATIENCE
        checkpointing = hooks.PeriodicCheckpointer(
            self.checkpointer,
            cfg.SOLVER.CHECKPOINT_PERIOD,
            cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP,
            keep_every=cfg.SOLVER.CHECKPOINT_KEEP_EVERY,
            minutes=cfg.SOLVER.CHECKPOINT_MINUTES,
            check_period=cfg.LOG.PERIOD,
            background=cfg.SOLVER.CHECKPOINT_IN_BACKGROUND,
        )
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(self.scheduler),
            hooks.NonFiniteGuard(cfg.SOLVER.NON_FINITE_MAX_SKIPS),
            hooks.BadImageLog(cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.MAX_BAD_IMAGE_SHARE),
            hooks.BadStepRecorder(self.checkpointer),
            hooks.TorchProfiler(cfg.LOG.PROFILE_START_ITER, cfg.LOG.PROFILE_END_ITER, cfg.OUTPUT_DIR)
            if profile
            else None,
            # BatchNorm statistics before the checkpoint, so that the checkpoint has them.
            hooks.PreciseBN(period, self.evaluated_model(), self.build_train_loader(cfg), cfg.TEST.PRECISE_BN.NUM_ITER)
            if cfg.TEST.PRECISE_BN.ENABLED
            else None,
            # The checkpoint before the evaluation: if that fails, its weights are there to look at.
            checkpointing,
            hooks.EvalHook(period, self._evaluate, eval_at_start=cfg.TEST.EVAL_AT_START) if cfg.DATASETS.TEST else None,
            best if cfg.TEST.BEST_METRIC else None,
            hooks.EarlyStopping(best, period, patience) if patience else None,
            # Last, so that what all others measured is written.
            hooks.PeriodicWriter(self.build_writers, cfg.LOG.PERIOD) if is_main else None,
            hooks.StopOnSignal(checkpointing),
        ]

    def evaluated_model(self) -> nn.Module:
        """Images -> BackboneOutput, sharing the weights that are trained."""
        model = self.bare_model
        return model.feature_model() if hasattr(model, "feature_model") else model  # type: ignore[operator]

    def _evaluate(self) -> dict[str, Any]:
        self.last_results = self.test(self.cfg, gathered_model(self.bare_model, lambda: self.build_model(self.cfg)))
        return self.last_results

    def build_writers(self) -> list[EventWriter]:
        cfg = self.cfg
        return default_writers(
            cfg.OUTPUT_DIR,
            self.max_iter,
            start_iter=self.start_iter,
            images_per_iter=cfg.SOLVER.IMS_PER_BATCH,
            window_size=cfg.LOG.PERIOD,
            tensorboard=cfg.LOG.TENSORBOARD,
            progress_bar=cfg.LOG.PROGRESS_BAR,
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device, or on "meta" where that is asked for. Its weights are a function of the config alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.SEED)
            model = build_model(cfg)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%s: %s trainable parameters.", type(model).__name__, f"{trainable:,}")
        return model if next(model.parameters()).is_meta else model.to(training_device(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> OptimizerSchedule:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """An endless loader of SSLBatch; its ``batch_sampler.start_iter`` is set when a run is resumed, and the images that
        it replaces are counted."""
        return build_train_loader(cfg, replace_bad_images=cfg.DATALOADER.MAX_BAD_IMAGE_SHARE > 0)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset: str) -> Any:
        """A loader of ImageBatch over this rank's part of a dataset."""
        return build_test_loader(cfg, dataset)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset)

    @classmethod
    def check_evaluation(cls, cfg: CfgNode) -> None:
        """See that every dataset of DATASETS.TEST suits the evaluators; nothing is read but names and labels.

        Raises:
            ValueError, KeyError, FileNotFoundError: if one does not, or is not there.
        """
        for dataset in cfg.DATASETS.TEST:
            cls.build_evaluator(cfg, dataset)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on every dataset of DATASETS.TEST.

        Args:
            model: one with ``feature_model()``, or itself images -> BackboneOutput.
            evaluators: one per dataset; None builds TEST.EVALUATORS.

        Returns:
            ``{task: {metric: value}}``, nested under the dataset string when there are several datasets.

        Raises:
            ValueError: if the number of evaluators is not that of datasets.
        """
        datasets = cfg.DATASETS.TEST
        if evaluators is not None and len(evaluators) != len(datasets):
            raise ValueError(f"{len(evaluators)} evaluators were given for {len(datasets)} datasets in DATASETS.TEST.")
        model = model.feature_model() if hasattr(model, "feature_model") else model  # type: ignore[operator]
        results = {}
        for i, dataset in enumerate(datasets):
            evaluator = evaluators[i] if evaluators is not None else cls.build_evaluator(cfg, dataset)
            loader = cls.build_test_loader(cfg, dataset)
            results[dataset] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info("Results on %s:", dataset)
                print_csv_format(results[dataset])
            make = functools.partial(
                make_record,
                cfg,
                dataset,
                model=model,
                num_images=len(loader.dataset),
                protocol=evaluator.protocol(),
                results=results[dataset],
                iteration=get_event_storage().iter if has_event_storage() else None,
            )
            comm.on_main_process(lambda make=make: save_record(make(), cfg.OUTPUT_DIR))  # type: ignore[misc]
        return results[datasets[0]] if len(datasets) == 1 else results

    @classmethod
    def check_expected_results(cls, cfg: CfgNode, results: dict[str, Any]) -> None:
        """Exit with code 1 if ``results`` miss TEST.EXPECTED_RESULTS."""
        if cfg.TEST.EXPECTED_RESULTS and not verify_results(cfg.TEST.EXPECTED_RESULTS, results):
            raise SystemExit(1)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """See ``scale_config_to_world_size``."""
        return scale_config_to_world_size(cfg, num_workers)
