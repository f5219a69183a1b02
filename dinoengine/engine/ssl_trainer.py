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
from dinoengine.evaluation import class_names, flatten_results_dict, labels_by_name, pixel_knn_accuracy, results_table
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
            hooks.ParamSchedule(
                "teacher_temp", schedules["teacher_temp"], lambda value: setattr(model, "teacher_temp", value)
            ),
            # Before the checkpointer: a checkpoint holds the teacher of its iteration.
            hooks.EMATeacher(model, schedules["teacher_momentum"]),  # type: ignore[arg-type]
            timer,  # here, because the teacher's update is part of the step
            *others,
        ]

    def report_results(self) -> None:
        """Show a table of the teacher beside TEST.BASELINES; save it with the results in ``results.json``."""
        if self.last_results:
            tables = self.report(self.cfg, self.last_results)
            if comm.is_main_process():
                with atomic_write(self._results_path, "w") as file:
                    json.dump({"results": self.last_results, "tables": tables}, file, indent=1)
        self._say_where()

    def results_of_finished_run(self) -> dict[str, Any]:
        """Those in ``results.json``; a run that was stopped before they were written is evaluated now."""
        saved = None
        if comm.is_main_process() and os.path.exists(self._results_path):
            with open(self._results_path, encoding="utf-8") as file:
                saved = json.load(file)
        saved = comm.broadcast_object(saved)
        if saved is None:
            if self.cfg.DATASETS.TEST:
                logger.info("Its final evaluation is missing; evaluating now.")
            self.last_results = super().results_of_finished_run()
            self.report_results()
            return self.last_results
        _log_tables(saved["tables"])
        self._say_where()
        results: dict[str, Any] = saved["results"]
        return results

    @property
    def _results_path(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, RESULTS_FILE)

    def _say_where(self) -> None:
        logger.info("Everything of this run is in %s", os.path.abspath(self.cfg.OUTPUT_DIR))

    @classmethod
    def report(cls, cfg: CfgNode, results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
        """Log a table per dataset: the teacher's results and, for k-NN, those of TEST.BASELINES.

        Args:
            results: what ``test`` returned.

        Returns:
            dataset -> feature -> metric -> value.
        """
        datasets = cfg.DATASETS.TEST
        untrained = cls._untrained_results(cfg) if "untrained" in cfg.TEST.BASELINES else None
        tables = {}
        for dataset in datasets:
            rows: dict[str, dict[str, float]] = {}
            if "pixels" in cfg.TEST.BASELINES:
                bank = build_test_loader(cfg, cfg.TEST.KNN.TRAIN or cfg.DATASETS.TRAIN)
                queries = build_test_loader(cfg, dataset)
                names = labels_by_name(class_names(bank, "its training set"), class_names(queries, "the test set"))
                pixels = pixel_knn_accuracy(cfg, bank, queries, names)
                rows["raw pixels"] = flatten_results_dict({"knn": pixels})
            if untrained is not None:
                rows["untrained backbone"] = flatten_results_dict(_of(untrained, dataset, datasets))
            rows["trained teacher"] = flatten_results_dict(_of(results, dataset, datasets))
            tables[dataset] = rows
        _log_tables(tables)
        return tables

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
