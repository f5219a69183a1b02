"""dinoengine's own checkpoints, and what conversions to them write."""

from __future__ import annotations

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict, short_list
from dinoengine.checkpoint.layouts.layout import Hints, Layout, add_prefix, is_state_dict, strip_prefix
from dinoengine.checkpoint.layouts.meta import published_interpolation
from dinoengine.checkpoint.weights import BackboneSpec, Weights, make_weights
from dinoengine.config import CfgNode, cfg_from_text, get_cfg
from dinoengine.modeling.backbone.vit import VisionTransformer

_PREFIXES = {
    part: f"{side}.{name}."
    for side, before in (("teacher", ""), ("student", "student."))
    for name in ("backbone", "dino_head", "ibot_head")
    for part in [before + name]
}
_CENTERS = {"dino": "dino_targets.center", "ibot": "ibot_targets.center"}


class Own(Layout):
    """``{"model": {"teacher.backbone.x", "student.backbone.x", ...}, "config": text, "iteration": n, ...}``."""

    name = "dinoengine"
    states_shape = True
    description = "dinoengine checkpoint (a run's, or backbone and heads alone)"

    def detect(self, content: FileContent) -> bool:
        model = content.data.get("model")
        return is_state_dict(model) and any(name.startswith(("teacher.backbone.", "backbone.")) for name in model)

    def read(self, content: FileContent, hints: Hints) -> Weights:
        model = content.data.get("model")
        if not is_state_dict(model):
            raise CheckpointError(f"{content.path} has no 'model' state dict; it has {short_list(list(content.data))}.")
        prefixes = dict(_PREFIXES)
        if not any(name.startswith("teacher.") for name in model):
            prefixes = {"backbone": "backbone.", "linear_head": "head."}  # a classifier
        parts: dict[str, StateDict] = {
            part: entries for part, prefix in prefixes.items() if (entries := strip_prefix(model, prefix))
        }
        if centers := {name: model[key] for name, key in _CENTERS.items() if key in model}:
            parts["centers"] = centers
        known = (*prefixes.values(), *_CENTERS.values())
        facts = self._facts_of_config(content, parts, hints)
        return make_weights(
            self.name,
            content.path,
            parts,
            **facts,  # type: ignore[arg-type]
            unused=[name for name in model if not name.startswith(known)],
            iteration=content.data.get("iteration"),
            config=content.data.get("config"),
        )

    def _facts_of_config(self, content: FileContent, parts: dict[str, StateDict], hints: Hints) -> dict[str, object]:
        """What the shapes do not say, from the config in the file."""
        registers = parts.get("backbone", {}).get("register_tokens")
        antialias, offset = published_interpolation(0 if registers is None else registers.shape[1])
        text = content.data.get("config")
        if not isinstance(text, str):
            return {
                "antialias": antialias,
                "offset": offset,
                "num_heads": hints.num_heads,
                "table_grid": hints.table_grid,
            }
        arguments = VisionTransformer.from_config(cfg_from_text(text))
        patch = arguments["patch_size"]
        grid = (arguments["img_size"][0] // patch, arguments["img_size"][1] // patch)
        return {
            "antialias": arguments["interpolate_antialias"],
            "offset": arguments["interpolate_offset"],
            "num_heads": arguments["num_heads"],
            "table_grid": grid,
        }

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        is_classifier = "linear_head" in weights.parts
        prefixes = {"backbone": "backbone.", "linear_head": "head."} if is_classifier else _PREFIXES
        model: StateDict = {}
        lost = []
        for part, entries in weights.parts.items():
            if part == "centers" and not is_classifier:
                model |= {_CENTERS[name]: center for name, center in entries.items()}
            elif part in prefixes:
                model |= add_prefix(entries, prefixes[part])
            else:
                lost += [f"{part}.{name}" for name in entries]
        return FileContent("", {"model": model, "config": str(config_of(weights.spec, weights.config).dump())}), lost


def config_of(spec: BackboneSpec, text: str | None) -> CfgNode:
    """A config (``text``, or the defaults) whose MODEL.VIT keys and channels build ``spec``."""
    cfg = cfg_from_text(text) if text else get_cfg()
    cfg.MODEL.VIT.EMBED_DIM = cfg.MODEL.VIT.DEPTH = cfg.MODEL.VIT.NUM_HEADS = 0
    for key, value in spec.config_options().items():
        cfg.merge_from_list([key, value])
    if spec.layer_scale and not cfg.MODEL.VIT.LAYER_SCALE_INIT:
        cfg.MODEL.VIT.LAYER_SCALE_INIT = 1e-5
    if len(cfg.MODEL.PIXEL_MEAN) != spec.in_chans:
        # Other channels need statistics of their own; these leave pixels in -1..1.
        cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = (0.5,) * spec.in_chans
    if spec.in_chans == 1:
        cfg.INPUT.FORMAT = "L"
    return cfg
