"""Records of evaluations side by side: those that may be compared in one table, and why others may not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from dinoengine.evaluation.records import differences
from dinoengine.evaluation.testing import flatten_results_dict

Record = Mapping[str, Any]

_PARTS = ("dataset", "num_images", "protocol", "preprocessing", "weights", "results")


def read_record(path: str) -> dict[str, Any]:
    """A file that ``save_record`` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else.
    """
    with open(path, encoding="utf-8") as file:
        try:
            record = json.load(file)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError both are
            raise ValueError(f"{path} is no JSON file: {error}") from None
    missing = [part for part in _PARTS if not isinstance(record, dict) or part not in record]
    if missing:
        raise ValueError(
            f"{path} is no record of an evaluation: it lacks {', '.join(missing)}. Records are in OUTPUT_DIR/eval."
        )
    return record


def group_comparable(records: Mapping[str, Record]) -> list[dict[str, Record]]:
    """Records by path -> groups of such as may be compared (``differences`` finds none), in the order they came."""
    groups: list[dict[str, Record]] = []
    for path, record in records.items():
        fitting = (group for group in groups if not differences(next(iter(group.values())), record))
        group = next(fitting, None)
        if group is None:
            groups.append({path: record})
        else:
            group[path] = record
    return groups


def render(records: Mapping[str, Record]) -> str:
    """A table per group, one row per record and one column per metric; then what parts a group from the first."""
    groups = group_comparable(records)
    first = next(iter(groups[0].values()))
    blocks = []
    for number, group in enumerate(groups, 1):
        one = next(iter(group.values()))
        title = f"Group {number} of {len(groups)}: {one['dataset']}, {one['num_images']} images"
        if number > 1:
            lines = "".join(f"\n  {line}" for line in differences(first, one, ("group 1", f"group {number}")))
            title += f"\nNot comparable with group 1:{lines}"
        blocks.append(f"{title}\n{_table(group)}")
    return "\n\n".join(blocks)


def _table(group: Mapping[str, Record]) -> str:
    metrics = {path: flatten_results_dict(record["results"]) for path, record in group.items()}
    columns = list(dict.fromkeys(name for values in metrics.values() for name in values))
    paths = sorted(group, key=lambda path: _iteration(group[path]))  # stable: otherwise as they were given
    rows = [[*_names(path, group[path]), *(metrics[path].get(name) for name in columns)] for path in paths]
    headers = ["run", "weights", "sha256", *columns]
    return tabulate(rows, headers=headers, floatfmt=".4g", missingval="-", disable_numparse=[0, 1, 2])


def _iteration(record: Record) -> float:
    iteration = record["weights"]["iteration"]
    return float("inf") if iteration is None else float(iteration)


def _names(path: str, record: Record) -> tuple[str, str, str]:
    """(the folder of the run, what was evaluated, first digits of its hash)."""
    weights = record["weights"]
    run = os.path.dirname(os.path.dirname(path)) or "."
    what = (
        (weights["file"] or "untrained (no file)")
        if weights["iteration"] is None
        else f"iteration {weights['iteration']}"
    )
    return run, what, weights["sha256"][:8]
