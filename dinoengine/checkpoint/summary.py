"""What is in a weight file, of any layout, without a model in memory."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections import Counter

from tabulate import tabulate
from torch import Tensor

from dinoengine.checkpoint.files import StateDict, grouped_names, short_list
from dinoengine.checkpoint.heads import head_arguments
from dinoengine.checkpoint.layouts import LAYOUTS, Hints, read_weights
from dinoengine.checkpoint.layouts.own import config_of
from dinoengine.checkpoint.weights import Weights
from dinoengine.utils.file_io import local_path

Summary = dict[str, str]
"""Quantity -> value for people, in the order to show."""

OVERRIDES = "config overrides"
_NONE = "-"


def summarize(path: str, layout: str = "auto", hints: Hints | None = None) -> Summary:
    """Describe one file.

    Args:
        layout, hints: as in ``read_weights``.

    Raises:
        FileNotFoundError, CheckpointError: if it cannot be read.
    """
    weights = read_weights(path, layout, hints)
    spec, parts = weights.spec, weights.parts
    tensors = [value for entries in parts.values() for value in entries.values()]
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors)
    return {
        "file size": f"{_num_bytes(local_path(path)) / 1e6:,.1f} MB",
        "layout": f"{weights.layout}: {LAYOUTS[weights.layout].description}",
        "architecture": spec.describe(),
        "patch": f"{spec.patch_size} pixels",
        "registers": str(spec.num_register_tokens),
        "image size": "{} x {} pixels".format(*spec.img_size),
        "parameters of the backbone": _num_values(parts["backbone"]),
        "entries": f"{len(tensors)} ({', '.join(f'{count} {name}' for name, count in dtypes.most_common())})",
        "student": ", ".join(part.removeprefix("student.") for part in parts if part.startswith("student.")) or _NONE,
        "DINO head": _head(parts.get("dino_head")),
        "iBOT head": _head(parts.get("ibot_head")),
        "linear head": _linear_head(parts.get("linear_head")),
        "centres": ", ".join(f"{name} {list(v.shape)}" for name, v in parts.get("centers", {}).items()) or _NONE,
        "iteration": _NONE if weights.iteration is None else f"{weights.iteration:,}",
        "config of a run": "in the file" if weights.config is not None else _NONE,
        "mask token": _mask_token(parts["backbone"].get("mask_token"), weights),
        "missing": _names(weights.missing),
        "unused": _names(weights.unused),
        "not finite": _names(weights.not_finite()),
        OVERRIDES: overrides_line(weights),
    }


def overrides_line(weights: Weights) -> str:
    """KEY VALUE pairs, quoted for a shell, with which a config that names a SIZE builds this backbone."""
    cfg = config_of(weights.spec, weights.config)
    options = {**weights.spec.config_options(), "MODEL.VIT.LAYER_SCALE_INIT": cfg.MODEL.VIT.LAYER_SCALE_INIT}
    if weights.spec.in_chans != 3:
        options |= {f"MODEL.{key}": cfg.MODEL[key] for key in ("PIXEL_MEAN", "PIXEL_STD")}
        options |= {f"INPUT.{key}": cfg.INPUT[key] for key in ("FORMAT", "VALUE_RANGE")}
    return " ".join(f"{key} {shlex.quote(str(value))}" for key, value in options.items())


def render(summaries: dict[str, Summary]) -> str:
    """File -> summary, as text: a table, one column per file, then the overrides of each."""
    width = 100 if len(summaries) == 1 else 48
    names = [name for name in next(iter(summaries.values())) if name != OVERRIDES]
    rows = [[name, *(textwrap.fill(s[name], width) for s in summaries.values())] for name in names]
    table = tabulate(rows, headers=["", *summaries], tablefmt="simple", disable_numparse=True)
    lines = [f"{path}: {summary[OVERRIDES]}" for path, summary in summaries.items()]
    return "\n".join([table, "", "Config overrides that build the backbone:", *lines])


def _num_bytes(path: str) -> int:
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    return os.path.getsize(path)


def _num_values(entries: StateDict) -> str:
    return f"{sum(value.numel() for value in entries.values()):,}"


def _head(entries: StateDict | None) -> str:
    if entries is None:
        return _NONE
    arguments = head_arguments(entries)
    hidden = f", hidden {arguments['hidden_dim']:,}" if arguments["num_layers"] > 1 else ""
    return f"{arguments['num_prototypes']:,} prototypes{hidden}, bottleneck {arguments['bottleneck_dim']:,}"


def _linear_head(entries: StateDict | None) -> str:
    return _NONE if entries is None else "{} classes of {} features".format(*entries["weight"].shape)


def _mask_token(token: Tensor | None, weights: Weights) -> str:
    if token is None:
        return f"none in the {weights.layout} layout" if "mask_token" in weights.absent else _NONE
    return "trained" if token.any() else "all zero: a distilled release, never trained on masks"


def _names(names: list[str]) -> str:
    return f"{len(names)}: {short_list(grouped_names(names))}" if names else _NONE
