"""Results as files that say what they are results of, so that two are comparable or visibly not."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import dinoengine
from dinoengine.checkpoint.digest import update_with_tensor
from dinoengine.config import CfgNode
from dinoengine.data import ImageDataset
from dinoengine.evaluation.label_sets import training_strings
from dinoengine.utils.file_writing import write_json

FOLDER = "eval"

_FACTS = ("num_heads", "interpolate_antialias", "interpolate_offset")


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of names, shapes, types and values of a model's state: the same weights from any file give the same.

    Settings that make other features of the same tensors (number of heads, interpolation of positions) count as well.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        facts = [f"{fact}={getattr(module, fact)}" for fact in _FACTS if hasattr(module, fact)]
        digest.update(f"{name} {facts};".encode() if facts else b"")
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} ".encode())
        update_with_tensor(digest, tensor)
    return digest.hexdigest()


def preprocessing(cfg: CfgNode) -> dict[str, Any]:
    """What happens to an image before the model sees it in an evaluation."""
    test = cfg.INPUT.TEST
    return {
        "format": cfg.INPUT.FORMAT,
        **({"value_range": list(cfg.INPUT.VALUE_RANGE)} if cfg.INPUT.VALUE_RANGE else {}),
        "resize_px": test.RESIZE_PX,
        "crop_size_px": [test.CROP_SIZE_PX[0], test.CROP_SIZE_PX[-1]],
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "float32_precision": cfg.FLOAT32_PRECISION,
    }


def _sets_of(cfg: CfgNode, task: str, dataset: str) -> dict[str, list[str]]:
    """The datasets that an evaluator learns from and chooses on; none for those without keys for them."""
    keys = cfg.TEST.get(task.upper(), {})
    sets = {"train": training_strings(cfg, keys["TRAIN"], dataset)} if "TRAIN" in keys else {}
    return {name: list(strings) for name, strings in (*sets.items(), ("val", keys.get("VAL"))) if strings}


def index_sha256(dataset: ImageDataset) -> str:
    """Of names and labels: a folder whose files changed between two runs is not the same dataset."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        digest.update(f"{dataset.describe(i)}\0{dataset.label(i)}\n".encode())
    return digest.hexdigest()


def make_record(
    cfg: CfgNode,
    dataset: str,
    *,
    model: nn.Module,
    num_images: int,
    protocol: Mapping[str, Any],
    results: Mapping[str, Any],
    iteration: int | None = None,
) -> dict[str, Any]:
    """What is kept of one evaluation; JSON-serialisable.

    Args:
        model: what was evaluated, images -> features.
        num_images: of the dataset, over all processes.
        protocol: ``DatasetEvaluator.protocol()``.
        iteration: of the training that is running, numbered as in metrics.json; None: the weights came from MODEL.WEIGHTS.
    """
    return {
        "dataset": dataset,
        "num_images": num_images,
        "results": results,
        "protocol": {task: {**settings, **_sets_of(cfg, task, dataset)} for task, settings in protocol.items()},
        "preprocessing": preprocessing(cfg),
        "weights": {
            "sha256": weights_sha256(model),
            "file": cfg.MODEL.WEIGHTS if iteration is None else "",
            "iteration": iteration,
        },
        "software": {"dinoengine": dinoengine.__version__, "torch": torch.__version__},
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def save_record(record: Mapping[str, Any], output_dir: str) -> str:
    """Write ``output_dir/eval/<iteration or weights>-<dataset>.json``; returns its path.

    The same weights on the same dataset by another protocol get a file of their own.
    """
    weights = record["weights"]
    iteration = weights["iteration"]
    which = f"weights_{weights['sha256'][:8]}" if iteration is None else f"iter_{iteration:07d}"
    dataset = dataset_in_file_name(record["dataset"])
    what = [record["dataset"], record["protocol"], record["preprocessing"]]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, allow_nan=False).encode()).hexdigest()
    folder = os.path.join(output_dir, FOLDER)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{which}-{dataset}-{digest[:8]}.json")
    write_json(path, record)
    return path


def dataset_in_file_name(dataset: str) -> str:
    """A dataset string as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", dataset).strip("_")[-80:]


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], called: tuple[str, str] = ("the first", "the second")
) -> list[str]:
    """Why two records are not comparable, one line each; empty if they are.

    An evaluator that only one of them has is one line, ``knn: only in the first``.

    Args:
        called: what the two are called in these lines.
    """
    parts = ("dataset", "num_images", "preprocessing")
    one, two = first["protocol"], second["protocol"]
    shared = [task for task in one if task in two]
    return [
        *differing_settings({part: first[part] for part in parts}, {part: second[part] for part in parts}),
        *differing_settings(
            {"protocol": {task: one[task] for task in shared}}, {"protocol": {task: two[task] for task in shared}}
        ),
        *(f"{task}: only in {called[0]}" for task in one if task not in two),
        *(f"{task}: only in {called[1]}" for task in two if task not in one),
    ]


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """One line ``name: value and other value`` for each leaf in which two nested dicts differ."""
    found: list[str] = []
    for part in dict.fromkeys((*first, *second)):
        one, other = _flat(first.get(part), part), _flat(second.get(part), part)
        found += [
            f"{key}: {one.get(key, 'none')} and {other.get(key, 'none')}"
            for key in sorted(one.keys() | other.keys())
            if one.get(key) != other.get(key)
        ]
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for inner, part in value.items() for key, leaf in _flat(part, f"{name}.{inner}").items()}
