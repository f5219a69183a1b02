"""The training step of a config alone, to be timed: what plans and benchmarks run."""

from __future__ import annotations

import itertools
import sys

from dinoengine.config import CfgNode
from dinoengine.engine.setup import set_backends
from dinoengine.engine.simple_trainer import SimpleTrainer
from dinoengine.engine.ssl_trainer import SSLTrainer
from dinoengine.modeling.meta_arch.student_teacher import StudentTeacher
from dinoengine.solver import build_lr_scheduler, build_optimizer
from dinoengine.structures import SSLBatch


class BareStep:
    """The steps of a run in one process, on one batch, without loader, hooks and files.

    All that changes speed is as in the run: backends, precision, micro-batches, clipping, the optimizer, the teacher's
    update, and on CUDA the copy of the next batch beside the step, if the batch is in host memory (pinned, as loaders give
    it). The learning rate is that of the run's second iteration: many steps on one batch would diverge.

    Attributes:
        model: with student and teacher.
        trainer: whose ``iter`` counts the steps.
    """

    def __init__(self, cfg: CfgNode, batch: SSLBatch) -> None:
        """
        Args:
            cfg: MODEL.DEVICE "cpu" or "cuda", SOLVER.AMP.PRECISION chosen.
            batch: of SOLVER.IMS_PER_BATCH images.
        """
        set_backends(cfg, training=True)
        model = SSLTrainer.build_model(cfg)
        assert isinstance(model, StudentTeacher), type(model)
        self.model = model
        self.teacher_momentum = cfg.MODEL.TEACHER.MOMENTUM
        optimizer = build_optimizer(cfg, model)
        build_lr_scheduler(cfg, optimizer).apply(1)
        self.trainer = SimpleTrainer(
            model,
            itertools.repeat(batch),
            optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32",
            clip_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
            num_micro_batches=cfg.SOLVER.NUM_MICRO_BATCHES,
            gather_metric_period=cfg.LOG.PERIOD,
            seed=0,
        )
        self.trainer.max_iter = sys.maxsize  # there is always a next batch to fetch

    def __call__(self) -> None:
        """One step; on CUDA its last kernels may still run when it returns."""
        self.trainer.run_step()
        self.model.update_teacher(self.teacher_momentum)
        self.trainer.iter += 1
