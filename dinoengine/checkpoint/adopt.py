"""Weights of any layout into the model of a run: what MODEL.WEIGHTS does."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from dinoengine.checkpoint.files import StateDict
from dinoengine.checkpoint.layouts import Hints
from dinoengine.checkpoint.weights import (
    CLASSIFIER_PARTS,
    PUBLISHED_HEAD_WIDTH,
    SELF_DISTILLATION_PARTS,
    BackboneSpec,
    Weights,
)
from dinoengine.config import CfgNode, ConfigError
from dinoengine.modeling.backbone.vit import VisionTransformer

logger = logging.getLogger(__name__)

MASK_TOKEN_STD = 0.02
_MASK_TOKEN = "backbone.mask_token"
# Parts of self-distillation beside the backbones, as ``Adopted.initial`` names them.
_BESIDE_FEATURES = {f"{side}.{head}" for side in ("student", "teacher") for head in ("dino_head", "ibot_head")}
_BESIDE_FEATURES |= {"dino_targets", "ibot_targets"}


@dataclass
class Adopted:
    """Entries for a model, by the model's names.

    Attributes:
        state: those the file has, also of another shape than the model's.
        initial: names of whole parts that the file does not have (heads, centres); they keep their initial values.
        missing: entries that the file should have, as it has the part.
        unused_parts: parts of the file that the model does not have.
    """

    state: StateDict
    initial: list[str]
    missing: list[str]
    unused_parts: list[str]


def adopt(weights: Weights, own: StateDict) -> Adopted:
    """Find each entry of a model in ``weights``; a student without weights of its own takes the teacher's.

    Args:
        own: the model's state dict: ``student.backbone.x``, ``teacher.dino_head.x``, ``backbone.x``, ``head.x`` ...
    """
    adopted = Adopted({}, [], [], [])
    used = set()
    for key in own:
        part, name = _find(key, weights)
        if part not in weights.parts:
            top = ".".join(key.split(".")[:2]) if key.startswith(("student.", "teacher.")) else key.split(".")[0]
            if top not in adopted.initial:
                adopted.initial.append(top)
            continue
        used.add(part)
        if name in weights.parts[part]:
            adopted.state[key] = weights.parts[part][name]
        else:
            adopted.missing.append(key)
    adopted.unused_parts = [part for part in weights.parts if part not in used]
    return adopted


def _find(key: str, weights: Weights) -> tuple[str, str]:
    """(part, name) under which ``weights`` would have the entry of a model; parts that no layout has are not found."""
    for outer, (part, inner) in {**SELF_DISTILLATION_PARTS, **CLASSIFIER_PARTS}.items():
        if key.startswith(outer):
            found = part if part in weights.parts else part.removeprefix("student.")
            return found, inner + key.removeprefix(outer)
    return "", key


def trains_with_masks(model: nn.Module) -> bool:
    """Whether a loss of the model uses masks: without one, masking is disabled and mask tokens are not trained."""
    return any(p.requires_grad for name, p in model.named_parameters() if name.endswith(_MASK_TOKEN))


def fresh_mask_tokens(state: StateDict, own: StateDict, path: str) -> StateDict:
    """Random values, the same in each place, for mask tokens that were never trained (all zeros, or not in the file).

    Distilled releases were trained without masks. Zeros would do as an initial value where everything else is initial
    too; in a trained backbone they are a token it has never seen.

    Args:
        state: what the file gives to the model.
        own: the model's state dict.
    """
    tokens: StateDict = {}
    for key, value in own.items():
        if not key.endswith(_MASK_TOKEN) or (key in state and bool(state[key].any())):
            continue
        if not tokens:
            logger.warning(
                "The mask token of %s is %s: it was never trained (distilled releases were not). It starts from random "
                "values (normal, std %g).",
                path,
                "all zeros" if key in state else "not in the file",
                MASK_TOKEN_STD,
            )
        random = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * MASK_TOKEN_STD
        tokens[key] = random.to(value.dtype)
    return tokens


def log_adopted(weights: Weights, adopted: Adopted, path: str, *, for_training: bool) -> None:
    """One line for what came, and one for each thing that did not.

    Args:
        for_training: a warning for heads that start anew; features do not depend on those of self-distillation, so that
            an evaluation gets an info. A classifier's head decides its answers in both.
    """
    kinds = ", ".join(part for part in weights.parts if part not in adopted.unused_parts)
    logger.info("%s: layout %s, %s; taken: %s.", path, weights.layout, weights.spec.describe(), kinds)
    matters = for_training or not _BESIDE_FEATURES.issuperset(adopted.initial)
    if adopted.initial:
        logger.log(
            logging.WARNING if matters else logging.INFO,
            "Not in %s, so they %s: %s.",
            path,
            "start from their initial values"
            if matters
            else "have their initial values, on which no feature (but the use of prototypes) depends",
            ", ".join(adopted.initial),
        )
    if adopted.unused_parts:
        logger.warning("In %s, but not used by this model: %s.", path, ", ".join(adopted.unused_parts))


def required(names: list[str]) -> list[str]:
    """Without mask tokens, which many files do not have."""
    return [name for name in names if not name.endswith(_MASK_TOKEN)]


def require_entries(weights: Weights, adopted: Adopted, path: str) -> None:
    """
    Raises:
        CheckpointError: if entries are missing from parts that the file has, or have no place.
    """
    named = {"missing": required(adopted.missing), "without a place": weights.unused}
    weights.account_for(path, named, "Set MODEL.WEIGHTS_STRICT False to load only what fits.")


def fit_config(cfg: CfgNode, weights: Weights, path: str) -> None:
    """Set the keys that weights decide and configs need not know, and say so.

    They are MODEL.VIT.POS_EMBED_SIZE_PX where it is 0, and how positions are interpolated.

    Args:
        cfg: not frozen; changed in place.
    """
    vit, spec = cfg.MODEL.VIT, weights.spec
    is_unset = vit.POS_EMBED_SIZE_PX == (0,) and spec.patch_size == vit.PATCH_SIZE_PX
    if is_unset and spec.img_size != _pair(cfg.INPUT.GLOBAL_CROPS.SIZE_PX):
        vit.POS_EMBED_SIZE_PX = spec.img_size
        logger.info("MODEL.VIT.POS_EMBED_SIZE_PX is %s, as in %s; other crops interpolate it.", spec.img_size, path)
    flags = (spec.interpolate_antialias, spec.interpolate_offset)
    if flags != (vit.INTERPOLATE_ANTIALIAS, vit.INTERPOLATE_OFFSET):
        vit.INTERPOLATE_ANTIALIAS, vit.INTERPOLATE_OFFSET = flags
        logger.info(
            "Positions are interpolated with antialias %s, offset %g, as the %s layout is.", *flags, weights.layout
        )


def require_same_backbone(cfg: CfgNode, weights: Weights, path: str) -> None:
    """See that a config (after ``fit_config``) builds the backbone of ``weights``.

    Raises:
        ConfigError: if it does not; gives the keys and the values to set.
    """
    if problems := _differences(cfg, weights.spec):
        what = f"MODEL.WEIGHTS {path} holds {weights.spec.describe()}, which the config does not build"
        raise ConfigError(what, problems)


def say_assumed_heads(weights: Weights, path: str) -> None:
    """Warn of a number of attention heads that the file does not state and published models do not have."""
    spec = weights.spec
    if spec.embed_dim != PUBLISHED_HEAD_WIDTH * spec.num_heads and not weights.states_shape:
        logger.warning(
            "%s does not state its attention heads; %d heads of %d channels are taken from the config. Published models "
            "have %d channels per head: another number is another network.",
            path,
            spec.num_heads,
            spec.embed_dim // spec.num_heads,
            PUBLISHED_HEAD_WIDTH,
        )


def hints_of_model(model: nn.Module) -> Hints:
    """What the model to be filled says where a file does not: attention heads, and a table that is no square."""
    backbone = next((m for m in model.modules() if isinstance(m, VisionTransformer)), None)
    if backbone is None:
        return Hints()
    rows, columns = backbone.table_grid
    return Hints(backbone.num_heads, (rows, columns) if rows != columns else None)


def hints_of_config(cfg: CfgNode) -> Hints:
    """As ``hints_of_model``, for the model that a config builds."""
    with torch.device("meta"):
        return hints_of_model(VisionTransformer(**VisionTransformer.from_config(cfg)))


def _differences(cfg: CfgNode, spec: BackboneSpec) -> list[str]:
    configured = VisionTransformer.from_config(cfg)
    crops = _pair(cfg.INPUT.GLOBAL_CROPS.SIZE_PX)
    wanted = spec.build("meta")
    if configured["patch_size"] == spec.patch_size:  # else its image size may not even be a multiple of the patch
        with torch.device("meta"):
            built = VisionTransformer(**configured)
        if _shapes(built) == _shapes(wanted) and configured["num_heads"] == spec.num_heads:
            return []
    problems = []
    for key, value in spec.config_options().items():
        now = cfg.MODEL.VIT[key.rpartition(".")[2]]
        if key.endswith("LAYER_SCALE_INIT"):
            is_same = bool(now) == bool(value)
        else:
            now = crops if key.endswith("POS_EMBED_SIZE_PX") and now == (0,) else now
            is_same = now == value or (key.endswith("POS_EMBED_SIZE_PX") and _pair(now) == value)
        if not is_same:
            problems.append(f"{key} is {now}, set it to {value}.")
    if len(cfg.MODEL.PIXEL_MEAN) != spec.in_chans:
        problems.append(
            f"MODEL.PIXEL_MEAN and PIXEL_STD have {len(cfg.MODEL.PIXEL_MEAN)} channels, not {spec.in_chans}."
        )
    if any("POS_EMBED" in problem for problem in problems):
        problems.append("To change the image or patch size of weights, use tools/resize_checkpoint.py.")
    return problems


def _shapes(model: VisionTransformer) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[-1]


def is_of_this_model(saved: Collection[str], own: Collection[str]) -> bool:
    """Whether the names of entries are this model's; a teacher alone is not a model with a student."""
    needs_student = any(name.startswith("student.") for name in own)
    has_student = any(name.startswith("student.") for name in saved)
    return not set(own).isdisjoint(saved) and (has_student or not needs_student)
