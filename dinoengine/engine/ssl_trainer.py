"""The trainer of the DINO family: a student, a teacher, and a comparison that tells whether it learned."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.engine import hooks
from dinoengine.engine.hooks.collapse_symptoms import Scales
from dinoengine.engine.reporting import ReportingTrainer, Rows, of_dataset
from dinoengine.engine.train_loop import HookBase
from dinoengine.evaluation import UnsuitableTestSetError, flatten_results_dict, match_label_sets, pixel_knn_accuracy
from dinoengine.solver import build_teacher_schedules
from dinoengine.utils import comm

logger = logging.getLogger(__name__)


class SSLTrainer(ReportingTrainer):
    """DefaultTrainer plus the EMA teacher, its temperature, the collapse guard, and the final results table."""

    model_name = "teacher"

    def build_hooks(self) -> list[HookBase | None]:
        schedules = build_teacher_schedules(self.cfg)
        model = self.bare_model
        timer, *others = super().build_hooks()
        return [
            hooks.ParamSchedule(
                "teacher_temp", schedules["teacher_temp"], lambda value: setattr(model, "teacher_temp", value)
            ),
            # Before the checkpointer: a checkpoint holds the teacher of its iteration.
            hooks.EMATeacher(model, schedules["teacher_momentum"]),  # type: ignore[arg-type]
            timer,  # here, because the teacher's update is part of the step
            *others,
            self._collapse_guard() if self.cfg.COLLAPSE_GUARD.ACTION != "off" else None,
        ]

    def _collapse_guard(self) -> HookBase:
        cfg, guard = self.cfg, self.cfg.COLLAPSE_GUARD
        early = cfg.SOLVER.WARMUP_ITERS + cfg.SOLVER.MAX_ITER // 10
        scales = Scales(
            num_prototypes=cfg.MODEL.DINO_HEAD.NUM_PROTOTYPES,
            dino_weight=cfg.MODEL.LOSS.DINO_WEIGHT,
            images_per_process=cfg.SOLVER.IMS_PER_BATCH // (comm.get_world_size() * cfg.SOLVER.NUM_MICRO_BATCHES),
            window=cfg.LOG.PERIOD,
        )
        return hooks.CollapseGuard(
            self.checkpointer,
            scales,
            action=guard.ACTION,
            grace_iters=early if guard.GRACE_ITERS < 0 else guard.GRACE_ITERS,
            patience=guard.PATIENCE,
        )

    @classmethod
    def baselines(cls, cfg: CfgNode) -> dict[str, Rows]:
        """For k-NN those of TEST.BASELINES."""
        untrained = cls._untrained_results(cfg) if "untrained" in cfg.TEST.BASELINES else None
        tables: dict[str, Rows] = {}
        for dataset in cfg.DATASETS.TEST:
            rows = tables[dataset] = {}
            if "pixels" in cfg.TEST.BASELINES and "knn" in cfg.TEST.EVALUATORS:
                with contextlib.suppress(UnsuitableTestSetError):  # left out by k-NN as well
                    sets = match_label_sets(cfg, "knn", cfg.TEST.KNN.TRAIN, dataset, build_test_loader)
                    queries = build_test_loader(cfg, dataset)
                    pixels = pixel_knn_accuracy(cfg, sets.train_loader, queries, sets.train_labels)
                    rows["raw pixels"] = flatten_results_dict({"knn": pixels})
            if untrained is not None:
                rows["untrained backbone"] = flatten_results_dict(of_dataset(cfg, untrained, dataset))
        return tables

    @classmethod
    def _untrained_results(cls, cfg: CfgNode) -> dict[str, Any]:
        """Results of the model exactly as training started from: build_model depends on the config alone."""
        logger.info("Evaluating the untrained backbone for comparison.")
        untrained = cfg.clone()
        untrained.defrost()
        untrained.MODEL.WEIGHTS = ""  # else the record would say that these weights came from there
        return cls.test(untrained, cls.build_model(untrained))
