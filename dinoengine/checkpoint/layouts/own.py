"""dinoengine's own checkpoints, and what conversions to them write."""

from __future__ import annotations

import logging
from typing import Any

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict, short_list
from dinoengine.checkpoint.heads import head_arguments, head_shape
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.layouts.layout import Hints, Layout, is_state_dict
from dinoengine.checkpoint.layouts.meta import published_interpolation
from dinoengine.checkpoint.weights import CLASSIFIER_PARTS, SELF_DISTILLATION_PARTS, BackboneSpec, Weights
from dinoengine.config import CfgNode, ConfigError, cfg_from_text, get_cfg
from dinoengine.config.pixels import NUM_CHANNELS, assumed_format
from dinoengine.modeling.backbone.vit import VisionTransformer

logger = logging.getLogger(__name__)

# Beside "config" where no run had that config: crops, pixel statistics and the recipe in it are defaults.
ORIGIN, BY_CONVERSION = "config_origin", "conversion"


class Own(Layout):
    """``{"model": {"teacher.backbone.x", "student.backbone.x", ...}, "config": text, "iteration": n, ...}``."""

    name = "dinoengine"
    is_nested = True
    states_shape = True
    description = "dinoengine checkpoint (a run's, or backbone and heads alone)"

    def detect(self, content: FileContent) -> bool:
        model = content.data.get("model")
        return is_state_dict(model) and any(name.startswith(("teacher.backbone.", "backbone.")) for name in model)

    def read(self, content: FileContent, hints: Hints) -> Weights:
        model = content.data.get("model")
        if not is_state_dict(model):
            raise CheckpointError(f"{content.path} has no 'model' state dict; it has {short_list(list(content.data))}.")
        is_student_teacher = any(name.startswith("teacher.") for name in model)
        parts, unused = _split(model, SELF_DISTILLATION_PARTS if is_student_teacher else CLASSIFIER_PARTS)
        text, problem = content.data.get("config"), ""
        facts: dict[str, Any] | None = None
        if isinstance(text, str):
            try:
                facts = _facts_of_config(text)
            except (ConfigError, LookupError, ArithmeticError) as error:
                problem = f"its config cannot be read by this version ({' '.join(str(error).split())})"
        if facts is None:
            facts = _facts_without_config(content.path, parts, hints, problem)
        is_of_run = facts["states_shape"] and content.data.get(ORIGIN) != BY_CONVERSION
        return make_weights(
            self.name,
            content.path,
            parts,
            **facts,
            unused=unused,
            left_out=[name for name in content.data if name not in ("model", "config", ORIGIN)],
            iteration=content.data.get("iteration"),
            config=text if is_of_run else None,
        )

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        is_classifier = "linear_head" in weights.parts
        table = CLASSIFIER_PARTS if is_classifier else SELF_DISTILLATION_PARTS
        model: StateDict = {}
        lost = []
        for part, entries in weights.parts.items():
            prefixes = {inner: outer for outer, (name, inner) in table.items() if name == part}
            for name, value in entries.items():
                found = next((inner for inner in prefixes if name.startswith(inner)), None)
                if found is None:
                    lost.append(f"{part}.{name}")
                else:
                    model[prefixes[found] + name.removeprefix(found)] = value
        data = {"model": model, "config": str(config_of(weights.spec, weights.config, weights.parts).dump())}
        return FileContent("", data if weights.config else data | {ORIGIN: BY_CONVERSION}), lost


def _split(model: StateDict, table: dict[str, tuple[str, str]]) -> tuple[dict[str, StateDict], list[str]]:
    """Entries of a model by part, in the order of the table, and those that no row of it knows."""
    parts: dict[str, StateDict] = {}
    known = set()
    for outer, (part, inner) in table.items():
        entries = {inner + name.removeprefix(outer): value for name, value in model.items() if name.startswith(outer)}
        known |= {name for name in model if name.startswith(outer)}
        if entries:
            parts.setdefault(part, {}).update(entries)
    return parts, [name for name in model if name not in known]


def _facts_of_config(text: str) -> dict[str, Any]:
    """What the shapes do not say.

    Raises:
        ConfigError, LookupError, ArithmeticError: if the text is no config of this version, or no valid one.
    """
    arguments = VisionTransformer.from_config(cfg_from_text(text))
    patch = arguments["patch_size"]
    return {
        "antialias": arguments["interpolate_antialias"],
        "offset": arguments["interpolate_offset"],
        "num_heads": arguments["num_heads"],
        "table_grid": (arguments["img_size"][0] // patch, arguments["img_size"][1] // patch),
        "states_shape": True,
    }


def _facts_without_config(path: str, parts: dict[str, StateDict], hints: Hints, problem: str) -> dict[str, Any]:
    """The same from the hints, as published models interpolate.

    Raises:
        CheckpointError: if the number of heads is not among the hints: a model of our own may have any.
    """
    if hints.num_heads is None:
        raise CheckpointError(
            f"{path}: {problem}; it states the attention heads: give --num-heads N (in Python Hints(num_heads=N))."
            if problem
            else f"{path} has no config, which states the attention heads; give --num-heads N (in Python "
            "Hints(num_heads=N))."
        )
    registers = parts.get("backbone", {}).get("register_tokens")
    antialias, offset = published_interpolation(0 if registers is None else registers.shape[1])
    if problem:
        logger.warning(
            "%s: %s; assumed: %d heads, positions interpolated with antialias %s, offset %g.",
            path,
            problem,
            hints.num_heads,
            antialias,
            offset,
        )
    return {
        "antialias": antialias,
        "offset": offset,
        "num_heads": hints.num_heads,
        "table_grid": hints.table_grid,
        "states_shape": False,
    }


def config_of(spec: BackboneSpec, text: str | None, parts: dict[str, StateDict] | None = None) -> CfgNode:
    """A config that builds ``spec``: that of the run (``text``), else the defaults with the heads among ``parts``."""
    cfg = cfg_from_text(text) if text else get_cfg()
    cfg.MODEL.VIT.EMBED_DIM = cfg.MODEL.VIT.DEPTH = cfg.MODEL.VIT.NUM_HEADS = 0
    for key, value in spec.config_options().items():
        if key.endswith("LAYER_SCALE_INIT") and bool(cfg.MODEL.VIT.LAYER_SCALE_INIT) == bool(value):
            continue  # the run's own initial value
        cfg.merge_from_list([key, value])
    if len(cfg.MODEL.PIXEL_MEAN) != spec.in_chans:
        # Other channels need statistics of their own; these leave pixels in -1..1.
        cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = (0.5,) * spec.in_chans
    if NUM_CHANNELS.get(cfg.INPUT.FORMAT, spec.in_chans) != spec.in_chans:
        cfg.merge_from_list([word for pair in assumed_format(spec.in_chans).items() for word in pair])
    if not text:
        _state_heads(cfg, spec, parts or {})
    return cfg


def _state_heads(cfg: CfgNode, spec: BackboneSpec, parts: dict[str, StateDict]) -> None:
    for part, node in (("dino_head", cfg.MODEL.DINO_HEAD), ("ibot_head", cfg.MODEL.IBOT_HEAD)):
        if part in parts:
            for name, value in head_arguments(parts[part]).items():
                node[name.upper()] = value
    cfg.MODEL.IBOT_HEAD.SEPARATE = "ibot_head" in parts
    if "linear_head" in parts:
        cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
        cfg.INPUT.AUGMENTATION = "SingleCrop"
        for name, value in head_shape(parts["linear_head"], spec.embed_dim, "the weights")._asdict().items():
            cfg.MODEL.CLASSIFIER[name.upper()] = value
