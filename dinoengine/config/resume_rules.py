"""What a changed config key means to a run that is resumed: nothing, something defined, or no resume at all.

Most of what a run does is a function of config and iteration, so another config could always be used from some iteration
on. A change is accepted only where the result can be said in a sentence; the model that comes out is then of no config
alone, which is why it is shown. Everything else is a fork: a new run, with a folder and a config of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import yaml
from tabulate import tabulate

from dinoengine.config.config import ConfigError, flatten

# What a change means: it leaves the training as it is; it has the meaning given with the rule; the run is not resumed.
FREE, DEFINED, REFUSED = "free", "defined", "refused"

_LONGEST_VALUE = 48


class Rule(NamedTuple):
    """``pattern`` is a key or, with ``*``, a group of keys; ``meaning`` says why, of what is DEFINED what happens."""

    pattern: str
    kind: str
    meaning: str


_LR = "the LR is that of the new schedule from the next iteration on; it may jump"
_DECAY = "weight decay is that of the new schedule from the next iteration on; it may jump"
_TEACHER = "the teacher's momentum or temperature is that of the new schedule from the next iteration on; it may jump"
_MOMENTS = "the optimizer's moments go on from those saved; the new value holds from the next step on"
_ROUNDING = "the same mathematics; numbers are rounded otherwise from the next iteration on"
_MODEL = "another model: what is saved does not fit it, or would compute something else"
_OBJECTIVE = "another objective"
_DATA = "other images or crops: no sequence that any one config gives"

RULES: tuple[Rule, ...] = (
    Rule("OUTPUT_DIR", FREE, "a run may be moved"),
    Rule("MODEL.DEVICE", FREE, "of the machine, not of the run"),
    Rule("MODEL.WEIGHTS*", FREE, "what a run starts from; a resumed one has started"),
    Rule("MODEL.DDP.FIND_UNUSED_PARAMETERS", FREE, "how processes work together"),
    Rule("MODEL.ACTIVATION_CHECKPOINTING", FREE, "the same numbers, kept or computed again"),
    Rule("DATALOADER.NUM_WORKERS", FREE, "samples, crops and masks belong to positions, not to workers"),
    Rule("DATALOADER.PREFETCH_FACTOR", FREE, "samples, crops and masks belong to positions, not to workers"),
    Rule("DATALOADER.TIMEOUT_SECONDS", FREE, "samples, crops and masks belong to positions, not to workers"),
    Rule("DATALOADER.MAX_BAD_IMAGE_SHARE", FREE, "when the run ends"),
    Rule("INPUT.TEST.*", FREE, "evaluation"),
    Rule("DATASETS.TEST", FREE, "evaluation"),
    Rule("TEST.*", FREE, "evaluation"),
    Rule("SOLVER.CHECKPOINT_*", FREE, "what is kept"),
    Rule("SOLVER.NON_FINITE_*", FREE, "steps that change no weights"),
    Rule("COLLAPSE_GUARD.*", FREE, "when the run ends"),
    Rule("LOG.*", FREE, "what is shown"),
    Rule(
        "SOLVER.MAX_ITER",
        DEFINED,
        "LR, weight decay and teacher momentum are functions of the iteration over the new length; they may jump",
    ),
    Rule("SOLVER.BASE_LR", DEFINED, _LR),
    Rule("SOLVER.LR_SCALING", DEFINED, _LR),
    Rule("SOLVER.REFERENCE_BATCH_SIZE", DEFINED, _LR),
    Rule("SOLVER.MIN_LR", DEFINED, _LR),
    Rule("SOLVER.WARMUP_ITERS", DEFINED, _LR),
    Rule("SOLVER.FREEZE_LAST_LAYER_ITERS", DEFINED, _LR),
    Rule("SOLVER.BACKBONE_*_ITERS", DEFINED, _LR),
    Rule("SOLVER.LAYER_DECAY", DEFINED, _LR),
    Rule("SOLVER.PATCH_EMBED_LR_MULT", DEFINED, _LR),
    Rule("SOLVER.WEIGHT_DECAY", DEFINED, _DECAY),
    Rule("SOLVER.WEIGHT_DECAY_END", DEFINED, _DECAY),
    Rule("SOLVER.BETAS", DEFINED, _MOMENTS),
    Rule("SOLVER.EPS", DEFINED, _MOMENTS),
    Rule("SOLVER.MOMENTUM", DEFINED, _MOMENTS),
    Rule("SOLVER.CLIP_GRAD_NORM", DEFINED, "gradients are clipped to the new norm from the next iteration on"),
    Rule(
        "SOLVER.REFERENCE_WORLD_SIZE",
        DEFINED,
        "batch and iterations are compared as scaled for the number of processes; where they differ, their own rules hold",
    ),
    Rule("MODEL.TEACHER.*", DEFINED, _TEACHER),
    Rule("DETERMINISTIC", DEFINED, _ROUNDING),
    Rule("CUDNN_BENCHMARK", DEFINED, _ROUNDING),
    Rule("FLOAT32_PRECISION", DEFINED, _ROUNDING),
    Rule("MODEL.ATTENTION", DEFINED, _ROUNDING),
    Rule("MODEL.COMPILE", DEFINED, _ROUNDING),
    Rule("MODEL.DDP.FP16_COMPRESSION", DEFINED, _ROUNDING),
    Rule("MODEL.PARALLEL", DEFINED, _ROUNDING),
    Rule("MODEL.FSDP.GROUP_SIZE", DEFINED, _ROUNDING),
    Rule("SOLVER.AMP.*", DEFINED, f"{_ROUNDING}; a gradient scaler that the run had not (fp16) starts afresh"),
    Rule(
        "SOLVER.NUM_MICRO_BATCHES",
        DEFINED,
        "the same batches in other parts: other rounding and other stochastic depth",
    ),
    Rule("VERSION", REFUSED, "another layout of the config"),
    Rule("SEED", REFUSED, "another order of images, other crops and masks"),
    Rule("MODEL.META_ARCHITECTURE", REFUSED, _MODEL),
    Rule("MODEL.PIXEL_*", REFUSED, _MODEL),
    Rule("MODEL.BACKBONE.*", REFUSED, _MODEL),
    Rule("MODEL.VIT.*", REFUSED, _MODEL),
    Rule("MODEL.DINO_HEAD.*", REFUSED, _MODEL),
    Rule("MODEL.IBOT_HEAD.*", REFUSED, _MODEL),
    Rule("MODEL.CLASSIFIER.*", REFUSED, _OBJECTIVE),
    Rule("MODEL.LOSS.*", REFUSED, _OBJECTIVE),
    Rule("INPUT.FORMAT", REFUSED, _DATA),
    Rule("INPUT.VALUE_RANGE", REFUSED, _DATA),
    Rule("INPUT.AUGMENTATION", REFUSED, _DATA),
    Rule(
        "INPUT.AUGMENTATION_BACKEND",
        DEFINED,
        "the same crops, made by other code: pixels are rounded otherwise from the next iteration on",
    ),
    Rule(
        "INPUT.REDUCED_DECODE",
        DEFINED,
        "the same crops, of images decoded at another scale: pixels differ slightly from the next iteration on",
    ),
    Rule("INPUT.CROP_RATIO", REFUSED, _DATA),
    Rule("INPUT.*_CROPS.*", REFUSED, _DATA),
    Rule("INPUT.*_PROB", REFUSED, _DATA),
    Rule("INPUT.COLOR_JITTER.*", REFUSED, _DATA),
    Rule("INPUT.BLUR.*", REFUSED, _DATA),
    Rule("INPUT.SOLARIZE.*", REFUSED, _DATA),
    Rule("INPUT.MASK.*", REFUSED, _DATA),
    Rule("DATASETS.TRAIN", REFUSED, _DATA),
    Rule("DATASETS.TRAIN_WEIGHTS", REFUSED, _DATA),
    Rule("DATASETS.QUARANTINE", REFUSED, _DATA),
    Rule("DATALOADER.SAMPLER", REFUSED, _DATA),
    Rule("DATALOADER.SAMPLE_WEIGHTS", REFUSED, _DATA),
    Rule("DATALOADER.MAX_IMAGE_PIXELS", REFUSED, _DATA),  # which images are replaced
    Rule(
        "SOLVER.IMS_PER_BATCH",
        REFUSED,
        "iteration t takes positions t*B to (t+1)*B - 1 of the stream: with another B it would repeat or skip images",
    ),
    Rule("SOLVER.OPTIMIZER", REFUSED, "moments of one optimizer mean nothing to another"),
)
_UNKNOWN = Rule("*", REFUSED, "not a key of dinoengine, so nothing is known of it")


class Change(NamedTuple):
    """A key with another value than before; ``Unset`` where the key is not in that config."""

    key: str
    before: Any
    now: Any

    @property
    def rule(self) -> Rule:
        return rule_of(self.key)


class Unset:
    """The value of a key that a config does not have."""

    def __repr__(self) -> str:
        return "(not set)"


UNSET = Unset()


def rule_of(key: str) -> Rule:
    """The rule of a key; of one that no rule names (a key of your own) a refusal."""
    return next((rule for rule in RULES if fnmatchcase(key, rule.pattern)), _UNKNOWN)


def values_of_text(text: str, where: str) -> dict[str, Any]:
    """Nested values of a config as ``dump()`` wrote it; its keys need not be those of this version.

    Raises:
        ConfigError: if it is no YAML of keys.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(where, [f"not valid YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError(where, [f"holds a {type(values).__name__}; expected keys with values."])
    return values


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[Change]:
    """The keys that differ, in the order of ``new``; lists and tuples with the same entries are equal.

    Args:
        old, new: configs, or nested values of them.
        defaults: values of keys that ``old`` does not have: it may be of a version that did not know them yet.
    """
    before = {**dict(flatten(dict(defaults or {}))), **dict(flatten(dict(old)))}
    now = dict(flatten(dict(new)))
    keys = [*now, *(key for key in dict(flatten(dict(old))) if key not in now)]
    found = (Change(key, before.get(key, UNSET), now.get(key, UNSET)) for key in keys)
    return [change for change in found if _plain(change.before) != _plain(change.now)]


def changes_table(changes: list[Change]) -> str:
    """Key, values before and now, and what it means, a row each."""
    rows = [[c.key, _short(c.before), _short(c.now), "" if c.rule.kind == FREE else c.rule.meaning] for c in changes]
    return tabulate(rows, headers=["key", "before", "now", "what it means"], tablefmt="pipe", disable_numparse=True)


def require_resumable(changes: list[Change], checkpoint: str, run: str) -> None:
    """
    Args:
        checkpoint: what is resumed from, for the message.
        run: its folder.

    Raises:
        ConfigError: if a change is refused; names each, why, and how to fork.
    """
    refused = [change for change in changes if change.rule.kind == REFUSED]
    if refused:
        raise ConfigError(
            f"This config cannot go on from {checkpoint}. Set what changed back, or make it a run of its own that starts "
            f"from the full state of this one: --fork-from {run} OUTPUT_DIR <another folder>",
            [f"{c.key} was {_short(c.before)}, is now {_short(c.now)} ({c.rule.meaning})." for c in refused],
        )


def defined_rules_table() -> str:
    """The accepted changes as Markdown: docs/reliability.md has this table."""
    rows = ["| changed key | what it means |", "| --- | --- |"]
    meanings = dict.fromkeys(rule.meaning for rule in RULES if rule.kind == DEFINED)
    for meaning in meanings:
        keys = ", ".join(f"`{rule.pattern}`" for rule in RULES if (rule.kind, rule.meaning) == (DEFINED, meaning))
        rows.append(f"| {keys} | {meaning} |")
    return "\n".join(rows)


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    text = repr(_plain(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 4]} ..."
