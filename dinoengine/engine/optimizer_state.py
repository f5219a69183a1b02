"""The moments of an optimizer in a checkpoint: every parameter's are found by its name, or the name is in the error."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dinoengine.checkpoint import CheckpointError, read_checkpoint
from dinoengine.checkpoint.sharded import placed_like

logger = logging.getLogger(__name__)

_WITHOUT = "without_moments"
_MOST_NAMES = 4


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, and the names of the parameters that have no moments yet, as no step changed them."""
    state = optimizer.state_dict()
    ids = _parameter_ids(state["param_groups"])
    return {**state, _WITHOUT: [name for name, i in ids.items() if i not in state["state"]]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments of every parameter, found by name; groups and hyperparameters stay those of ``optimizer``.

    They come from the config, which may have changed on purpose (SOLVER.BETAS, LAYER_DECAY ...).

    Args:
        state: of ``optimizer_state``, or of torch's ``state_dict``: then no parameter may lack moments.

    Raises:
        ValueError: if the parameters are not those the state was saved for, or moments of one are missing or of another
            shape; names it.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    own, saved = _parameter_ids(own_groups), _parameter_ids(state["param_groups"])
    if own.keys() != saved.keys():
        raise ValueError(
            f"The optimizer state is of {len(saved)} parameters, this run trains {len(own)}; they differ in "
            f"{_names(list(own.keys() ^ saved.keys()))}. Resume with the model the run had, or start a new run from its "
            "weights with MODEL.WEIGHTS."
        )
    moments = {own[name]: state["state"][i] for name, i in saved.items() if i in state["state"]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _require_moments(own, dict(enumerate(parameters)), moments, state.get(_WITHOUT, []))
    moments = {
        i: {key: placed_like(v, parameters[i]) if _is_per_value(v) else v for key, v in entry.items()}
        for i, entry in moments.items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": own_groups})


def _require_moments(
    ids: dict[str | int, int],
    parameters: dict[int, torch.Tensor],
    moments: dict[int, dict[str, Any]],
    without: list[str | int],
) -> None:
    expected = {key for entry in moments.values() for key in entry}
    problems = []
    for name, i in ids.items():
        entry = moments.get(i)
        if entry is None:
            if name not in without:
                problems.append(str(name))
            continue
        problems += [f"{name} ({key})" for key in sorted(expected - entry.keys())]
        for key, value in entry.items():
            if _is_per_value(value) and value.shape != parameters[i].shape:
                problems.append(f"{name} ({key}: shape {list(value.shape)}, expected {list(parameters[i].shape)})")
    if problems:
        raise ValueError(
            f"The optimizer state lacks moments of {_names(problems)}. Resume from another checkpoint, or start a new run "
            "from these weights with MODEL.WEIGHTS and without --resume."
        )


def _is_per_value(value: Any) -> bool:
    """Whether it is of the shape of a parameter, not one number for all of it."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def load_optimizer_of(optimizer: torch.optim.Optimizer, path: str) -> None:
    """Load the moments that a checkpoint holds.

    Raises:
        CheckpointError: if it holds none.
        ValueError: if they are of other parameters.
    """
    state = read_checkpoint(path).get("trainer", {}).get("optimizer")
    if state is None:
        raise CheckpointError(f"{path} holds no optimizer state; set MODEL.WEIGHTS_WITH_OPTIMIZER False.")
    load_optimizer_state(optimizer, state)
    logger.info("Took the optimizer's moments from %s.", path)


def _names(names: list[Any]) -> str:
    more = f" ... and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(str(name) for name in names[:_MOST_NAMES]) + more


def _parameter_ids(groups: list[dict[str, Any]]) -> dict[str | int, int]:
    """Name of each parameter (its position, where groups carry no names) -> its number in an optimizer state."""
    ids = [i for group in groups for i in group["params"]]
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    return dict(zip(names, ids, strict=True))
