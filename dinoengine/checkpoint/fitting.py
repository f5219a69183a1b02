"""A state dict and the model it is to go into: what fits, and what is said where something does not."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import nn

from dinoengine.checkpoint.files import CheckpointError, grouped_names, short_list
from dinoengine.checkpoint.sharded import placed_like

logger = logging.getLogger(__name__)


def load_into(
    model: nn.Module,
    saved: dict[str, torch.Tensor],
    path: str,
    *,
    strict: bool,
    may_be_partial: bool,
    kept: Collection[str] = (),
) -> None:
    """Load a state dict, whole or shared, into a model, whole or shared; the model is unchanged if it does not fit.

    Args:
        path: of the file, for messages.
        may_be_partial: whether to advise MODEL.WEIGHTS_STRICT False.
        kept: entries of the model that ``saved`` need not have.

    Raises:
        CheckpointError: for any difference if ``strict``, else only when nothing fits.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in saved and key not in kept]
    unexpected = [key for key in saved if key not in own]
    misshapen = [key for key in own if key in saved and saved[key].shape != own[key].shape]
    problems = []
    if misshapen:
        shapes = [f"{k} {list(saved[k].shape)} (model: {list(own[k].shape)})" for k in misshapen]
        problems.append(f"{len(misshapen)} of another shape: {short_list(shapes)}")
    if missing:
        problems.append(f"{len(missing)} missing: {short_list(grouped_names(missing))}")
    if unexpected:
        problems.append(f"{len(unexpected)} not in the model: {short_list(grouped_names(unexpected))}")
    num_fitting = sum(key in saved for key in own) - len(misshapen)
    report = f"{path} does not fit the model ({num_fitting} of {len(own)} entries fit):\n  " + "\n  ".join(problems)
    if (problems and strict) or num_fitting == 0:
        advice = "Use the config it was trained with (config.yaml beside it)"
        advice += ", or set MODEL.WEIGHTS_STRICT False to load only what fits." if may_be_partial else "."
        raise CheckpointError(f"{report}\n{advice}")
    if problems:
        logger.warning("%s\nLoading what fits, as MODEL.WEIGHTS_STRICT is False.", report)
    fitting = {key: placed_like(saved[key], own[key]) for key in own if key in saved and key not in misshapen}
    model.load_state_dict(fitting, strict=False)


def is_of_this_model(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> bool:
    """Whether the names are this model's; a teacher alone is not a model with a student."""
    needs_student = any(name.startswith("student.") for name in own)
    has_student = any(name.startswith("student.") for name in saved)
    return bool(saved.keys() & own.keys()) and (has_student or not needs_student)
