"""The trainer of the DINO family: a student, a teacher, and a comparison that tells whether it learned."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.engine import hooks
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.train_loop import HookBase
from dinoengine.evaluation import flatten_results_dict, pixel_knn_accuracy, results_table
from dinoengine.solver import build_teacher_schedules
from dinoengine.utils import comm
from dinoengine.utils.file_io import atomic_write

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"


class SSLTrainer(DefaultTrainer):
    """DefaultTrainer plus the EMA teacher, its temperature, and the final results table."""

    def build_hooks(self) -> list[HookBase | None]:
        schedules = build_teacher_schedules(self.cfg)
        model = self.bare_model
        timer, *others = super().build_hooks()
        return [
            timer,
            hooks.ParamSchedule(
                "teacher_temp", schedules["teacher_temp"], lambda value: setattr(model, "teacher_temp", value)
            ),
            # Before the checkpointer: a checkpoint holds the teacher of its iteration.
            hooks.EMATeacher(model, schedules["teacher_momentum"]),  # type: ignore[arg-type]
            *others,
        ]

    def train(self) -> dict[str, Any]:  # type: ignore[override]
        """As DefaultTrainer, and a table of the teacher beside TEST.BASELINES, saved in ``results.json``."""
        already_done = self.start_iter >= self.max_iter
        results = super().train()
        if results:
            self.report(self.cfg, results)
        elif already_done:
            self.report_saved(self.cfg.OUTPUT_DIR)
        if comm.is_main_process():
            logger.info("Everything of this run is in %s", os.path.abspath(self.cfg.OUTPUT_DIR))
        return results

    @classmethod
    def report(cls, cfg: CfgNode, results: dict[str, Any], *, save: bool = True) -> None:
        """Log a table per dataset: the teacher's results and, for k-NN, those of TEST.BASELINES.

        Args:
            results: what ``test`` returned.
            save: also write ``results.json`` into OUTPUT_DIR.
        """
        datasets = cfg.DATASETS.TEST
        untrained = cls._untrained_results(cfg) if "untrained" in cfg.TEST.BASELINES else None
        tables = {}
        for dataset in datasets:
            rows: dict[str, dict[str, float]] = {}
            if "pixels" in cfg.TEST.BASELINES:
                bank = build_test_loader(cfg, cfg.TEST.KNN.TRAIN or cfg.DATASETS.TRAIN)
                pixels = pixel_knn_accuracy(cfg, bank, build_test_loader(cfg, dataset))
                rows["raw pixels"] = flatten_results_dict({"knn": pixels})
            if untrained is not None:
                rows["untrained backbone"] = flatten_results_dict(_of(untrained, dataset, datasets))
            rows["trained teacher"] = flatten_results_dict(_of(results, dataset, datasets))
            tables[dataset] = rows
        if not comm.is_main_process():
            return
        _log_tables(tables)
        if save:
            with atomic_write(os.path.join(cfg.OUTPUT_DIR, RESULTS_FILE), "w") as file:
                json.dump(tables, file, indent=1)

    @staticmethod
    def report_saved(output_dir: str) -> None:
        """Log the tables of a run that finished earlier."""
        path = os.path.join(output_dir, RESULTS_FILE)
        if comm.is_main_process() and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                _log_tables(json.load(file))

    @classmethod
    def _untrained_results(cls, cfg: CfgNode) -> dict[str, Any]:
        """Results of the model exactly as training started from: build_model depends on the config alone."""
        logger.info("Evaluating the untrained backbone for comparison.")
        return cls.test(cfg, cls.build_model(cfg))


def _of(results: dict[str, Any], dataset: str, datasets: tuple[str, ...]) -> dict[str, Any]:
    return results if len(datasets) == 1 else results[dataset]


def _log_tables(tables: dict[str, dict[str, dict[str, float]]]) -> None:
    for dataset, rows in tables.items():
        logger.info("Accuracy in percent on %s:\n%s", dataset, results_table(rows))
