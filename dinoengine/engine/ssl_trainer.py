"""The trainer of the DINO family: a student, a teacher, and a comparison that tells whether it learned."""

from __future__ import annotations

import logging
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.engine import hooks
from dinoengine.engine.reporting import ReportingTrainer, Rows, of_dataset
from dinoengine.engine.train_loop import HookBase
from dinoengine.evaluation import flatten_results_dict, match_label_sets, pixel_knn_accuracy
from dinoengine.solver import build_teacher_schedules

logger = logging.getLogger(__name__)


class SSLTrainer(ReportingTrainer):
    """DefaultTrainer plus the EMA teacher, its temperature, and the final results table."""

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
        ]

    @classmethod
    def baselines(cls, cfg: CfgNode) -> dict[str, Rows]:
        """For k-NN those of TEST.BASELINES."""
        untrained = cls._untrained_results(cfg) if "untrained" in cfg.TEST.BASELINES else None
        tables: dict[str, Rows] = {}
        for dataset in cfg.DATASETS.TEST:
            rows = tables[dataset] = {}
            if "pixels" in cfg.TEST.BASELINES:
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
        return cls.test(cfg, cls.build_model(cfg))
