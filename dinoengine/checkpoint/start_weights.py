"""Weights to start from, of this model or of any other that has a layout here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from dinoengine.checkpoint.adopt import (
    adopt,
    fresh_mask_tokens,
    hints_of_model,
    log_adopted,
    require_entries,
    required,
    trains_with_masks,
)
from dinoengine.checkpoint.fitting import is_of_this_model, load_into
from dinoengine.checkpoint.layouts import detect_layout
from dinoengine.checkpoint.layouts.layout import is_state_dict
from dinoengine.checkpoint.reading import read_content
from dinoengine.checkpoint.sharded import placed_like

logger = logging.getLogger(__name__)


def load_start_weights(
    model: nn.Module,
    path: str,
    *,
    strict: bool,
    for_training: bool,
    before_load: Callable[[dict[str, Any], str], None] | None = None,
) -> None:
    """See ``Checkpointer.load_weights``.

    Args:
        before_load: called with the content of the file and its path, before the model changes; may raise.
    """
    content = read_content(path)
    if before_load is not None:
        before_load(content.data, path)
    own = model.state_dict()
    saved = content.data.get("model")
    if is_state_dict(saved) and is_of_this_model(saved, own):
        load_into(model, saved, path, strict=strict, may_be_partial=True)
        logger.info("%s: layout dinoengine, a checkpoint of this model.", path)
        return
    weights = detect_layout(content).read(content, hints_of_model(model))
    adopted = adopt(weights, own)
    if strict:
        require_entries(weights, adopted, path)
    log_adopted(weights, adopted, path, for_training=for_training)
    # Parts that the file does not have keep the values they have; that is no fit, and nothing to complain of.
    kept = own.keys() - adopted.state.keys() - set(required(adopted.missing))
    load_into(model, adopted.state, path, strict=strict, may_be_partial=True, kept=kept)
    if for_training and trains_with_masks(model):
        tokens = fresh_mask_tokens(adopted.state, own, path)
        model.load_state_dict({key: placed_like(tokens[key], own[key]) for key in tokens}, strict=False)
