"""Parameter groups from what the model states about its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from dinoengine.structures import ParamFacts


def param_groups(
    model: nn.Module, *, layer_decay: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """One group per distinct (LR factor, weight-decay factor, last layer, backbone), in order of first use.

    Args:
        model: asked through ``param_facts(name)``; a model without it gets one group with decay and one without (its
            biases and other one-dimensional parameters).
        layer_decay: LR factor ``layer_decay ** (num_layers + 1 - layer_id)``.
        patch_embed_lr_mult: further LR factor of the patch embedding.

    Returns:
        Dicts with "params", "param_names", "lr_mult", "wd_mult", "is_last_layer", "in_backbone", for a torch optimizer.

    Raises:
        ValueError: if nothing is trainable.
    """
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():  # a shared parameter comes once, under its first name
        if not parameter.requires_grad:
            continue
        facts = facts_of(model, name, parameter)
        lr_mult = layer_decay ** (facts.num_layers + 1 - facts.layer_id)
        if facts.role == "patch_embed":
            lr_mult *= patch_embed_lr_mult
        key = (lr_mult, float(facts.weight_decay), facts.role == "last_layer", facts.in_backbone)
        if key not in groups:
            groups[key] = {
                "params": [],
                "param_names": [],
                "lr_mult": key[0],
                "wd_mult": key[1],
                "is_last_layer": key[2],
                "in_backbone": key[3],
            }
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    if not groups:
        raise ValueError("The model has no trainable parameter (requires_grad is False everywhere).")
    return list(groups.values())


def facts_of(model: nn.Module, name: str, parameter: nn.Parameter) -> ParamFacts:
    """What ``model`` states about a parameter, or for a model without ``param_facts`` what its shape suggests."""
    if hasattr(model, "param_facts"):
        facts: ParamFacts = model.param_facts(name)  # type: ignore[operator]
        return facts
    return ParamFacts(weight_decay=parameter.ndim > 1)
