"""Results that stay with the run: a table in the log and ``results.json``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from typing import Any

from dinoengine.config import CfgNode
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.evaluation import flatten_results_dict, results_tables
from dinoengine.utils import comm
from dinoengine.utils.file_writing import write_json

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"

# feature or model -> metric -> value
Rows = dict[str, dict[str, float]]


class ReportingTrainer(DefaultTrainer):
    """DefaultTrainer that shows its final results in a table per dataset and keeps them.

    Attributes:
        model_name: what the tables call the model; "trained teacher", or "teacher" where a file was evaluated.
    """

    model_name = "model"

    def report_results(self) -> None:
        """Show the tables of ``report``; save them with the results in ``results.json``."""
        if self.last_results:
            tables = self.report(self.cfg, self.last_results)
            if comm.is_main_process():
                content = {**self._results_of, "results": self.last_results, "tables": tables}
                write_json(self._results_path, content)
        self._say_where()

    def results_of_finished_run(self) -> dict[str, Any]:
        """Those in ``results.json``; if it has none of this iteration and these datasets, the run is evaluated now.

        A run that was stopped in its last evaluation has none, or those from before it was made longer.
        """
        saved = None
        if comm.is_main_process() and os.path.exists(self._results_path):
            with open(self._results_path, encoding="utf-8") as file, contextlib.suppress(ValueError):  # damaged: none
                saved = json.load(file)
            if not isinstance(saved, dict) or any(saved.get(key) != value for key, value in self._results_of.items()):
                saved = None
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
    def _results_of(self) -> dict[str, Any]:
        """What results belong to: finished iterations, datasets, and all that decides how they are evaluated."""
        cfg = self.cfg
        how = "".join((cfg.TEST.dump(), cfg.INPUT.TEST.dump(), str(cfg.DATASETS.TRAIN)))
        return {
            "iteration": self.iter,
            "datasets": list(cfg.DATASETS.TEST),
            "evaluation_sha256": hashlib.sha256(how.encode()).hexdigest(),
        }

    @property
    def _results_path(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, RESULTS_FILE)

    def _say_where(self) -> None:
        logger.info("Everything of this run is in %s", os.path.abspath(self.cfg.OUTPUT_DIR))

    @classmethod
    def report(cls, cfg: CfgNode, results: dict[str, Any], weights: str = "") -> dict[str, Rows]:
        """Log the tables of each dataset: the results, beside what they are to be compared with.

        Args:
            results: what ``test`` returned.
            weights: the file that was evaluated; empty: the model of this run.

        Returns:
            dataset -> feature or model -> metric -> value.
        """
        tables = {dataset: rows.copy() for dataset, rows in cls.baselines(cfg).items()}
        row = cls.model_name if weights else f"trained {cls.model_name}"
        for dataset in cfg.DATASETS.TEST:
            tables.setdefault(dataset, {})[row] = flatten_results_dict(of_dataset(cfg, results, dataset))
        _log_tables(tables, weights)
        return tables

    @classmethod
    def baselines(cls, cfg: CfgNode) -> dict[str, Rows]:
        """dataset -> what is shown before the model's results; none. Override to add some."""
        return {}


def of_dataset(cfg: CfgNode, results: dict[str, Any], dataset: str) -> dict[str, Any]:
    """The part of what ``test`` returned that is about one dataset."""
    part: dict[str, Any] = results if len(cfg.DATASETS.TEST) == 1 else results[dataset]
    return part


def _log_tables(tables: dict[str, Rows], weights: str = "") -> None:
    of = f"\nWeights: {weights}" if weights else ""
    for dataset, rows in tables.items():
        logger.info("Results on %s%s\n\n%s\n", dataset, of, results_tables(rows))
