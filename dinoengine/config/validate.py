"""Checks across keys, before anything is built. Every problem is reported at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from dinoengine.config import validate_evaluation as evaluation
from dinoengine.config.config import CfgNode, ConfigError
from dinoengine.config.pixels import NUM_CHANNELS
from dinoengine.config.validate_data import check_device_crops, check_reduced_decode, check_sampling, check_value_range
from dinoengine.config.validate_devices import check_device, check_sharding, check_sharding_groups
from dinoengine.config.validate_evaluation import are_numbers
from dinoengine.utils.registry import suggest

# key -> smallest value, largest value, whether the ends are allowed
_RANGES: dict[str, tuple[float, float, bool]] = {
    "SEED": (-1, float("inf"), True),
    "MODEL.VIT.EMBED_DIM": (0, float("inf"), True),
    "MODEL.VIT.DEPTH": (0, float("inf"), True),
    "MODEL.VIT.NUM_HEADS": (0, float("inf"), True),
    "MODEL.VIT.PATCH_SIZE_PX": (1, float("inf"), True),
    "MODEL.VIT.NUM_REGISTER_TOKENS": (0, float("inf"), True),
    "MODEL.VIT.FFN_RATIO": (0, float("inf"), False),
    "MODEL.VIT.LAYER_SCALE_INIT": (0, float("inf"), True),
    "MODEL.DINO_HEAD.NUM_PROTOTYPES": (1, float("inf"), True),
    "MODEL.DINO_HEAD.HIDDEN_DIM": (1, float("inf"), True),
    "MODEL.DINO_HEAD.BOTTLENECK_DIM": (1, float("inf"), True),
    "MODEL.DINO_HEAD.NUM_LAYERS": (1, float("inf"), True),
    "MODEL.IBOT_HEAD.NUM_PROTOTYPES": (1, float("inf"), True),
    "MODEL.IBOT_HEAD.HIDDEN_DIM": (1, float("inf"), True),
    "MODEL.IBOT_HEAD.BOTTLENECK_DIM": (1, float("inf"), True),
    "MODEL.IBOT_HEAD.NUM_LAYERS": (1, float("inf"), True),
    "MODEL.TEACHER.MOMENTUM": (0, 1, True),
    "MODEL.TEACHER.MOMENTUM_END": (0, 1, True),
    "MODEL.TEACHER.WARMUP_TEMP": (0, float("inf"), False),
    "MODEL.TEACHER.TEMP": (0, float("inf"), False),
    "MODEL.TEACHER.TEMP_WARMUP_ITERS": (0, float("inf"), True),
    "MODEL.LOSS.CENTER_MOMENTUM": (0, 1, True),
    "MODEL.LOSS.SINKHORN_ITERS": (1, float("inf"), True),
    "MODEL.LOSS.STUDENT_TEMP": (0, float("inf"), False),
    "MODEL.LOSS.DINO_WEIGHT": (0, float("inf"), True),
    "MODEL.LOSS.IBOT_WEIGHT": (0, float("inf"), True),
    "MODEL.LOSS.KOLEO_WEIGHT": (0, float("inf"), True),
    "MODEL.LOSS.KOLEO_GROUP_SIZE": (0, float("inf"), True),
    "MODEL.CLASSIFIER.NUM_CLASSES": (0, float("inf"), True),
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": (0, 1, True),
    "MODEL.CLASSIFIER.MIXUP_ALPHA": (0, float("inf"), True),
    "MODEL.CLASSIFIER.CUTMIX_ALPHA": (0, float("inf"), True),
    "INPUT.LOCAL_CROPS.NUM": (0, float("inf"), True),
    "INPUT.HFLIP_PROB": (0, 1, True),
    "INPUT.COLOR_JITTER.PROB": (0, 1, True),
    "INPUT.COLOR_JITTER.BRIGHTNESS": (0, float("inf"), True),
    "INPUT.COLOR_JITTER.CONTRAST": (0, float("inf"), True),
    "INPUT.COLOR_JITTER.SATURATION": (0, float("inf"), True),
    "INPUT.COLOR_JITTER.HUE": (0, 0.5, True),
    "INPUT.GRAYSCALE_PROB": (0, 1, True),
    "INPUT.SOLARIZE.THRESHOLD": (0, 256, True),
    "INPUT.MASK.CROP_SHARE": (0, 1, True),
    "INPUT.MASK.MIN_BLOCK_PATCHES": (1, float("inf"), True),
    "INPUT.TEST.RESIZE_PX": (0, float("inf"), True),
    "DATALOADER.NUM_WORKERS": (0, float("inf"), True),
    "DATALOADER.PREFETCH_FACTOR": (1, float("inf"), True),
    "DATALOADER.MAX_IMAGE_PIXELS": (1, 178956970, True),
    "DATALOADER.MAX_BAD_IMAGE_SHARE": (0, 1, True),
    "DATALOADER.TIMEOUT_SECONDS": (0, float("inf"), True),
    "MODEL.FSDP.GROUP_SIZE": (0, float("inf"), True),
    "SOLVER.IMS_PER_BATCH": (1, float("inf"), True),
    "SOLVER.NUM_MICRO_BATCHES": (1, float("inf"), True),
    "SOLVER.MAX_ITER": (1, float("inf"), True),
    "SOLVER.BASE_LR": (0, float("inf"), True),
    "SOLVER.MIN_LR": (0, float("inf"), True),
    "SOLVER.REFERENCE_BATCH_SIZE": (1, float("inf"), True),
    "SOLVER.WARMUP_ITERS": (0, float("inf"), True),
    "SOLVER.FREEZE_LAST_LAYER_ITERS": (0, float("inf"), True),
    "SOLVER.BACKBONE_FREEZE_ITERS": (0, float("inf"), True),
    "SOLVER.BACKBONE_RAMP_ITERS": (0, float("inf"), True),
    "SOLVER.PATCH_EMBED_LR_MULT": (0, float("inf"), True),
    "SOLVER.WEIGHT_DECAY": (0, float("inf"), True),
    "SOLVER.WEIGHT_DECAY_END": (0, float("inf"), True),
    "SOLVER.EPS": (0, float("inf"), False),
    "SOLVER.CLIP_GRAD_NORM": (0, float("inf"), True),
    "SOLVER.NON_FINITE_MAX_SKIPS": (0, float("inf"), True),
    "SOLVER.REFERENCE_WORLD_SIZE": (0, float("inf"), True),
    "SOLVER.CHECKPOINT_PERIOD": (0, float("inf"), True),
    "SOLVER.CHECKPOINT_MINUTES": (0, float("inf"), True),
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": (0, float("inf"), True),
    "SOLVER.CHECKPOINT_KEEP_EVERY": (0, float("inf"), True),
    "COLLAPSE_GUARD.GRACE_ITERS": (-1, float("inf"), True),
    "COLLAPSE_GUARD.PATIENCE": (1, float("inf"), True),
    "LOG.PROFILE_START_ITER": (0, float("inf"), True),
    "LOG.PROFILE_END_ITER": (0, float("inf"), True),
    "LOG.PERIOD": (1, 1000, True),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "FLOAT32_PRECISION": ("highest", "high", "medium"),
    "MODEL.DEVICE": ("auto", "cpu", "cuda"),
    "MODEL.PARALLEL": ("ddp", "fsdp"),
    "MODEL.ATTENTION": ("auto", "xformers", "varlen", "sdpa"),
    "MODEL.ACTIVATION_CHECKPOINTING": ("none", "selective", "full"),
    "MODEL.VIT.SIZE": ("micro", "tiny", "small", "base", "large", "giant"),
    "MODEL.VIT.FFN": ("mlp", "swiglu"),
    "MODEL.LOSS.CENTERING": ("centering", "sinkhorn_knopp"),
    "MODEL.CLASSIFIER.NUM_LAST_BLOCKS": ("1", "4"),
    "INPUT.FORMAT": ("RGB", "L", "RGBA", "channels"),
    "INPUT.AUGMENTATION_BACKEND": ("reference", "fast", "device"),
    "DATALOADER.SAMPLER": ("uniform", "class_balanced", "weighted"),
    "SOLVER.LR_SCALING": ("sqrt", "linear", "none"),
    "SOLVER.AMP.PRECISION": ("auto", "bf16", "fp16", "fp32"),
    "SOLVER.CHECKPOINT_ON_ERROR": ("stop", "continue"),
    "COLLAPSE_GUARD.ACTION": ("off", "warn", "stop", "rollback"),
}


def validate(cfg: CfgNode, world_size: int = 1, training: bool = True) -> list[str]:
    """Check ranges, choices and contradictions of a whole config.

    Args:
        world_size: number of processes the run will have.
        training: False checks only what an evaluation needs.

    Returns:
        Warnings: settings that work but can hardly be meant.

    Raises:
        ConfigError: lists every problem found.
    """
    checks: list[Callable[[CfgNode], Iterator[str]]] = [
        _check_ranges,
        _check_choices,
        _check_input,
        _check_sizes,
        _check_names,
        check_sharding,
        evaluation.problems,
        _check_classifier,
    ]
    if training:
        checks += [check_device, _check_training_data, check_sampling, check_reduced_decode, check_device_crops]
        checks += [] if _is_classifier(cfg) else [_check_losses]
    problems = [problem for check in checks for problem in check(cfg)]
    if training:
        problems += [*_check_batch(cfg, world_size), *check_sharding_groups(cfg, world_size)]
    elif not cfg.DATASETS.TEST:
        problems.append("DATASETS.TEST is empty, so there is nothing to evaluate on; name a dataset.")
    if problems:
        raise ConfigError("The config cannot be run", problems)
    return list(_warnings(cfg)) if training else []


def _get(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _is_classifier(cfg: CfgNode) -> bool:
    """Whether the keys of pretraining (losses, teacher, views beyond the first) are not used."""
    return bool(cfg.MODEL.CLASSIFIER.NUM_CLASSES > 0)


def _check_ranges(cfg: CfgNode) -> Iterator[str]:
    for key, (low, high, closed) in (_RANGES | evaluation.RANGES).items():
        value = _get(cfg, key)
        assert isinstance(value, (int, float)), key
        if not math.isfinite(value) or not (low <= value <= high if closed else low < value < high):
            upper = "" if high == float("inf") else f" and {'<=' if closed else '<'} {high:g}"
            yield f"{key} must be {'>=' if closed else '>'} {low:g}{upper}, got {value}."
    if not 0 <= cfg.MODEL.VIT.DROP_PATH_RATE < 1:
        yield f"MODEL.VIT.DROP_PATH_RATE must be >= 0 and < 1, got {cfg.MODEL.VIT.DROP_PATH_RATE}."
    if not 0 <= cfg.SOLVER.MOMENTUM < 1:
        yield f"SOLVER.MOMENTUM must be >= 0 and < 1, got {cfg.SOLVER.MOMENTUM}."
    if not 0 < cfg.SOLVER.LAYER_DECAY <= 1:
        yield f"SOLVER.LAYER_DECAY must be > 0 and <= 1, got {cfg.SOLVER.LAYER_DECAY}."
    if not 0 < cfg.INPUT.MASK.MIN_ASPECT <= 1:
        yield f"INPUT.MASK.MIN_ASPECT must be > 0 and <= 1, got {cfg.INPUT.MASK.MIN_ASPECT}."


def _check_choices(cfg: CfgNode) -> Iterator[str]:
    for key, choices in (_CHOICES | evaluation.CHOICES).items():
        value = str(_get(cfg, key))
        if value not in choices:
            yield f"{key} must be one of {', '.join(choices)}; got {value!r}{suggest(value, list(choices))}."


def _check_input(cfg: CfgNode) -> Iterator[str]:
    num_values = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    channels = NUM_CHANNELS.get(cfg.INPUT.FORMAT, max(1, num_values[0]))
    if num_values != (channels, channels):
        yield (
            f"INPUT.FORMAT {cfg.INPUT.FORMAT} has {channels} channel(s), but MODEL.PIXEL_MEAN has "
            f"{num_values[0]} values and MODEL.PIXEL_STD {num_values[1]}."
        )
    yield from check_value_range(cfg.INPUT.FORMAT, cfg.INPUT.VALUE_RANGE)
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        value = _get(cfg, key)
        if not are_numbers(value) or (key.endswith("STD") and any(v <= 0 for v in value)):
            yield f"{key} must be numbers{' > 0' if key.endswith('STD') else ''}, one per channel, got {value}."
    for key in ("INPUT.GLOBAL_CROPS.SCALE", "INPUT.LOCAL_CROPS.SCALE", "INPUT.MASK.RATIO"):
        value = _get(cfg, key)
        if not (are_numbers(value, 2) and 0 <= value[0] <= value[1] <= 1):
            yield f"{key} must be (low, high) with 0 <= low <= high <= 1, got {value}."
    for key in ("INPUT.CROP_RATIO", "INPUT.BLUR.SIGMA_PX"):
        value = _get(cfg, key)
        if not (are_numbers(value, 2) and 0 < value[0] <= value[1]):
            yield f"{key} must be (low, high) with 0 < low <= high, got {value}."
    for key in ("INPUT.BLUR.PROBS", "INPUT.SOLARIZE.PROBS"):
        value = _get(cfg, key)
        if not (are_numbers(value, 3) and all(0 <= p <= 1 for p in value)):
            yield f"{key} must be three probabilities (global view 1, global view 2, local views), got {value}."
    if cfg.INPUT.BLUR.KERNEL_SIZE_PX < 1 or cfg.INPUT.BLUR.KERNEL_SIZE_PX % 2 == 0:
        yield f"INPUT.BLUR.KERNEL_SIZE_PX must be odd and positive, got {cfg.INPUT.BLUR.KERNEL_SIZE_PX}."
    if not are_numbers(cfg.SOLVER.BETAS, 2) or not all(0 <= b < 1 for b in cfg.SOLVER.BETAS):
        yield f"SOLVER.BETAS must be two values >= 0 and < 1, got {cfg.SOLVER.BETAS}."


def _check_sizes(cfg: CfgNode) -> Iterator[str]:
    patch = cfg.MODEL.VIT.PATCH_SIZE_PX
    if patch < 1:
        return  # reported as out of range
    keys = ["INPUT.GLOBAL_CROPS.SIZE_PX", "INPUT.TEST.CROP_SIZE_PX"]
    pretraining = not _is_classifier(cfg)
    keys += ["INPUT.LOCAL_CROPS.SIZE_PX"] if cfg.INPUT.LOCAL_CROPS.NUM and pretraining else []
    keys += ["MODEL.VIT.POS_EMBED_SIZE_PX"] if cfg.MODEL.VIT.POS_EMBED_SIZE_PX != (0,) else []
    blur_reach = cfg.INPUT.BLUR.KERNEL_SIZE_PX // 2 if any(cfg.INPUT.BLUR.PROBS) and pretraining else 0
    for key in keys:
        value = _get(cfg, key)
        if len(value) not in (1, 2) or not all(isinstance(v, int) and v > 0 for v in value):
            yield f"{key} must be one or two positive whole numbers (rows, columns), got {value}."
        elif key != "MODEL.VIT.POS_EMBED_SIZE_PX" and "TEST" not in key and min(value) <= blur_reach:
            yield f"{key} {value} must be larger than half of INPUT.BLUR.KERNEL_SIZE_PX {cfg.INPUT.BLUR.KERNEL_SIZE_PX}."
        elif any(v % patch for v in value):
            below = tuple(max(patch, v // patch * patch) for v in value)
            above = tuple(-(-v // patch) * patch for v in value)
            near = " or ".join(dict.fromkeys((str(below), str(above))))
            yield f"{key} {value} is not a multiple of MODEL.VIT.PATCH_SIZE_PX {patch}; the nearest are {near}."
    vit = cfg.MODEL.VIT
    if vit.EMBED_DIM and vit.NUM_HEADS and vit.EMBED_DIM % vit.NUM_HEADS:
        yield f"MODEL.VIT.EMBED_DIM {vit.EMBED_DIM} is not divisible by MODEL.VIT.NUM_HEADS {vit.NUM_HEADS}."


def _check_losses(cfg: CfgNode) -> Iterator[str]:
    loss = cfg.MODEL.LOSS
    if loss.DINO_WEIGHT == 0 and loss.IBOT_WEIGHT == 0 and loss.KOLEO_WEIGHT == 0:
        yield "MODEL.LOSS: DINO_WEIGHT, IBOT_WEIGHT and KOLEO_WEIGHT are all 0, so there is nothing to optimise."
    if loss.IBOT_WEIGHT > 0 and (cfg.INPUT.MASK.CROP_SHARE == 0 or not any(cfg.INPUT.MASK.RATIO)):
        yield (
            "MODEL.LOSS.IBOT_WEIGHT > 0 needs masked patches, but INPUT.MASK.CROP_SHARE or INPUT.MASK.RATIO masks none; "
            "set IBOT_WEIGHT to 0 to train without iBOT."
        )
    elif loss.IBOT_WEIGHT > 0 and 0 < 2 * cfg.SOLVER.IMS_PER_BATCH * cfg.INPUT.MASK.CROP_SHARE < 1:
        yield (
            f"INPUT.MASK.CROP_SHARE {cfg.INPUT.MASK.CROP_SHARE} of the {2 * cfg.SOLVER.IMS_PER_BATCH} global crops of a "
            "batch is less than one, so nothing would ever be masked; raise it, or set MODEL.LOSS.IBOT_WEIGHT to 0."
        )


def _check_batch(cfg: CfgNode, world_size: int) -> Iterator[str]:
    batch, parts, group = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.NUM_MICRO_BATCHES, cfg.MODEL.LOSS.KOLEO_GROUP_SIZE
    if batch < 1 or parts < 1:
        return  # reported as out of range
    unit = world_size * parts
    if batch % unit:
        near = (batch // unit * unit, (batch // unit + 1) * unit)
        yield (
            f"SOLVER.IMS_PER_BATCH {batch} (global) is not divisible by {world_size} process(es) x "
            f"SOLVER.NUM_MICRO_BATCHES {parts}; the nearest possible: {' or '.join(str(n) for n in near if n)}."
        )
        return
    if _is_classifier(cfg):
        if batch == world_size and (cfg.MODEL.CLASSIFIER.MIXUP_ALPHA or cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA):
            yield (
                "MODEL.CLASSIFIER.MIXUP_ALPHA and CUTMIX_ALPHA mix the images of a process, and SOLVER.IMS_PER_BATCH "
                f"{batch} gives each of {world_size} a single one; raise it, or set both to 0."
            )
        return
    if cfg.MODEL.LOSS.KOLEO_WEIGHT > 0 and group == 1:
        yield "MODEL.LOSS.KOLEO_GROUP_SIZE 1 leaves no other image to compare with; use 0 (all) or at least 2."
    if cfg.MODEL.LOSS.KOLEO_WEIGHT > 0 and group == 0 and parts > 1:
        yield (
            "MODEL.LOSS.KOLEO_GROUP_SIZE 0 compares the whole global batch, which micro-batches never hold at once; "
            f"with SOLVER.NUM_MICRO_BATCHES {parts} set KOLEO_GROUP_SIZE to a divisor of {batch // (parts * world_size)}."
        )
    if cfg.MODEL.LOSS.KOLEO_WEIGHT > 0 and group > 0 and (batch // parts) % group:
        yield (
            f"MODEL.LOSS.KOLEO_GROUP_SIZE {group} does not divide the {batch // parts} images of "
            "SOLVER.IMS_PER_BATCH / SOLVER.NUM_MICRO_BATCHES."
        )
    # A micro-batch must hold the same groups as the whole batch would, or accumulation would change the loss.
    if cfg.MODEL.LOSS.KOLEO_WEIGHT > 0 and group > 0 and parts > 1 and (batch // (parts * world_size)) % group:
        yield (
            f"MODEL.LOSS.KOLEO_GROUP_SIZE {group} must divide the {batch // (parts * world_size)} images of one "
            "micro-batch of one process when SOLVER.NUM_MICRO_BATCHES > 1."
        )


def _check_names(cfg: CfgNode) -> Iterator[str]:
    for key in ("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.QUARANTINE", *evaluation.NAME_LISTS):
        if not all(isinstance(name, str) and name for name in _get(cfg, key)):
            yield f"{key} must list names, got {_get(cfg, key)}; write a number in quotes if it is a name."


def _check_training_data(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS_WITH_OPTIMIZER and not cfg.MODEL.WEIGHTS:
        yield "MODEL.WEIGHTS_WITH_OPTIMIZER needs a checkpoint in MODEL.WEIGHTS."
    if not cfg.DATASETS.TRAIN:
        yield 'DATASETS.TRAIN is empty; name your images, e.g. DATASETS.TRAIN "folder:/path/to/images".'
    if cfg.COLLAPSE_GUARD.ACTION == "rollback" and not cfg.SOLVER.CHECKPOINT_PERIOD:
        yield "COLLAPSE_GUARD.ACTION rollback needs checkpoints to go back to: set SOLVER.CHECKPOINT_PERIOD."


def _check_classifier(cfg: CfgNode) -> Iterator[str]:
    """A classifier is asked for in three places that must agree; names of a user's own are left to the user."""
    architecture, augmentation = cfg.MODEL.META_ARCHITECTURE, cfg.INPUT.AUGMENTATION
    if not _is_classifier(cfg):
        if architecture == "ImageClassifier":
            yield "MODEL.META_ARCHITECTURE ImageClassifier needs MODEL.CLASSIFIER.NUM_CLASSES of at least 1."
        return
    asked = f"MODEL.CLASSIFIER.NUM_CLASSES {cfg.MODEL.CLASSIFIER.NUM_CLASSES} asks for a classifier"
    if architecture == "DINOv2":
        yield f"{asked}, but MODEL.META_ARCHITECTURE is DINOv2; set ImageClassifier, or NUM_CLASSES 0 for pretraining."
    if augmentation == "MultiCrop":
        yield f"{asked}, which sees one view of an image, but INPUT.AUGMENTATION is MultiCrop; set SingleCrop."
    if cfg.TEST.BASELINES:
        yield f"{asked}; TEST.BASELINES {cfg.TEST.BASELINES} are baselines of k-NN in pretraining, set ()."
    if cfg.TEST.PRECISE_BN.ENABLED:
        yield f"{asked}; TEST.PRECISE_BN is for pretraining, set ENABLED False."


def _warnings(cfg: CfgNode) -> Iterator[str]:
    total = cfg.SOLVER.MAX_ITER
    if total <= cfg.SOLVER.WARMUP_ITERS:
        yield f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} >= SOLVER.MAX_ITER {total}: the LR never reaches its peak."
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bf16" and cfg.MODEL.DEVICE == "cpu":
        yield "SOLVER.AMP on the CPU: most CPUs are slower in bf16 than in fp32; SOLVER.AMP.PRECISION auto measures."
    if not cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "auto":
        yield "SOLVER.AMP.PRECISION auto measures nothing: SOLVER.AMP.ENABLED is False, and products are computed in fp32."
    if cfg.MODEL.COMPILE and cfg.MODEL.PARALLEL == "fsdp":
        yield (
            "MODEL.COMPILE with MODEL.PARALLEL fsdp: parts of a block are gathered one by one, so each block is compiled "
            "in pieces; time a few steps with and without."
        )
    period, keep_every = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP_EVERY
    if keep_every and (not period or keep_every % period):
        yield (
            f"SOLVER.CHECKPOINT_KEEP_EVERY {keep_every} is no multiple of SOLVER.CHECKPOINT_PERIOD {period}: many of the "
            "checkpoints to be kept are never written."
        )
    if not _is_classifier(cfg):
        yield from _pretraining_warnings(cfg)


def _pretraining_warnings(cfg: CfgNode) -> Iterator[str]:
    total = cfg.SOLVER.MAX_ITER
    if total < cfg.MODEL.TEACHER.TEMP_WARMUP_ITERS:
        yield f"MODEL.TEACHER.TEMP_WARMUP_ITERS > SOLVER.MAX_ITER {total}: the temperature never reaches TEMP."
    if total <= cfg.SOLVER.FREEZE_LAST_LAYER_ITERS:
        yield f"SOLVER.FREEZE_LAST_LAYER_ITERS >= SOLVER.MAX_ITER {total}: the prototypes are never trained."
    if 0 < total <= cfg.SOLVER.BACKBONE_FREEZE_ITERS:
        yield f"SOLVER.BACKBONE_FREEZE_ITERS >= SOLVER.MAX_ITER {total}: the backbone is never trained."
    if cfg.MODEL.TEACHER.MOMENTUM > cfg.MODEL.TEACHER.MOMENTUM_END:
        yield "MODEL.TEACHER.MOMENTUM is above MOMENTUM_END: the teacher would follow the student ever faster."
    kept_iters = cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP * cfg.SOLVER.CHECKPOINT_PERIOD
    until_noticed = (cfg.COLLAPSE_GUARD.PATIENCE + 1) * cfg.LOG.PERIOD
    if cfg.COLLAPSE_GUARD.ACTION == "rollback" and 0 < kept_iters < until_noticed + cfg.SOLVER.CHECKPOINT_PERIOD:
        yield (
            f"COLLAPSE_GUARD.ACTION rollback: it takes up to {until_noticed} iterations to notice a collapse, and the "
            f"SOLVER.CHECKPOINT_MAX_TO_KEEP {cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP} checkpoints kept may all be younger."
        )
    if cfg.MODEL.LOSS.KOLEO_WEIGHT > 0 and cfg.SOLVER.IMS_PER_BATCH == 1:
        yield "KoLeo needs at least two images to compare; with SOLVER.IMS_PER_BATCH 1 its loss is 0."
