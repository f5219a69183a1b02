"""A training YAML of the published DINOv2 code as a dinoengine config.

That code merges a file of differences into its ``ssl_default_config.yaml``; so does this module, and then translates the
keys one by one. Epochs there are a fixed number of iterations (``train.OFFICIAL_EPOCH_LENGTH``) whatever the dataset,
and batches are per GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from dinoengine.config.config import CfgNode, ConfigError, flatten, unflatten
from dinoengine.config.defaults import get_cfg
from dinoengine.config.show import annotated_yaml
from dinoengine.config.validate import validate
from dinoengine.utils.registry import suggest

# The published defaults of every key that is translated. The others are in _NO_COUNTERPART.
_PUBLISHED: dict[str, Any] = {
    "MODEL.WEIGHTS": "",
    "compute_precision.student.backbone.mixed_precision.param_dtype": "fp16",
    "dino.loss_weight": 1.0,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "ibot.separate_head": False,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 64,
    "train.dataset_path": "ImageNet:split=TRAIN",
    "train.num_workers": 10,
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.drop_path_uniform": True,
    "student.pretrained_weights": "",
    "student.ffn_layer": "mlp",
    "student.qkv_bias": True,
    "student.proj_bias": True,
    "student.ffn_bias": True,
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 0.004,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": [0.32, 1.0],
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": [0.05, 0.32],
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
}

# Same meaning, same unit.
_RENAMED = {
    "dino.loss_weight": "MODEL.LOSS.DINO_WEIGHT",
    "dino.head_n_prototypes": "MODEL.DINO_HEAD.NUM_PROTOTYPES",
    "dino.head_bottleneck_dim": "MODEL.DINO_HEAD.BOTTLENECK_DIM",
    "dino.head_nlayers": "MODEL.DINO_HEAD.NUM_LAYERS",
    "dino.head_hidden_dim": "MODEL.DINO_HEAD.HIDDEN_DIM",
    "dino.koleo_loss_weight": "MODEL.LOSS.KOLEO_WEIGHT",
    "ibot.loss_weight": "MODEL.LOSS.IBOT_WEIGHT",
    "ibot.mask_sample_probability": "INPUT.MASK.CROP_SHARE",
    "ibot.mask_ratio_min_max": "INPUT.MASK.RATIO",
    "ibot.separate_head": "MODEL.IBOT_HEAD.SEPARATE",
    "ibot.head_n_prototypes": "MODEL.IBOT_HEAD.NUM_PROTOTYPES",
    "ibot.head_bottleneck_dim": "MODEL.IBOT_HEAD.BOTTLENECK_DIM",
    "ibot.head_nlayers": "MODEL.IBOT_HEAD.NUM_LAYERS",
    "ibot.head_hidden_dim": "MODEL.IBOT_HEAD.HIDDEN_DIM",
    "train.output_dir": "OUTPUT_DIR",
    "train.num_workers": "DATALOADER.NUM_WORKERS",
    "train.centering": "MODEL.LOSS.CENTERING",
    "student.patch_size": "MODEL.VIT.PATCH_SIZE_PX",
    "student.drop_path_rate": "MODEL.VIT.DROP_PATH_RATE",
    "student.drop_path_uniform": "MODEL.VIT.DROP_PATH_UNIFORM",
    "student.qkv_bias": "MODEL.VIT.QKV_BIAS",
    "student.proj_bias": "MODEL.VIT.PROJ_BIAS",
    "student.ffn_bias": "MODEL.VIT.FFN_BIAS",
    "student.num_register_tokens": "MODEL.VIT.NUM_REGISTER_TOKENS",
    "student.interpolate_antialias": "MODEL.VIT.INTERPOLATE_ANTIALIAS",
    "student.interpolate_offset": "MODEL.VIT.INTERPOLATE_OFFSET",
    "teacher.momentum_teacher": "MODEL.TEACHER.MOMENTUM",
    "teacher.final_momentum_teacher": "MODEL.TEACHER.MOMENTUM_END",
    "teacher.warmup_teacher_temp": "MODEL.TEACHER.WARMUP_TEMP",
    "teacher.teacher_temp": "MODEL.TEACHER.TEMP",
    "optim.weight_decay": "SOLVER.WEIGHT_DECAY",
    "optim.weight_decay_end": "SOLVER.WEIGHT_DECAY_END",
    "optim.base_lr": "SOLVER.BASE_LR",
    "optim.min_lr": "SOLVER.MIN_LR",
    "optim.clip_grad": "SOLVER.CLIP_GRAD_NORM",
    "optim.patch_embed_lr_mult": "SOLVER.PATCH_EMBED_LR_MULT",
    "optim.layerwise_decay": "SOLVER.LAYER_DECAY",
    "crops.global_crops_scale": "INPUT.GLOBAL_CROPS.SCALE",
    "crops.local_crops_number": "INPUT.LOCAL_CROPS.NUM",
    "crops.local_crops_scale": "INPUT.LOCAL_CROPS.SCALE",
    "crops.global_crops_size": "INPUT.GLOBAL_CROPS.SIZE_PX",
    "crops.local_crops_size": "INPUT.LOCAL_CROPS.SIZE_PX",
}

# Epochs of OFFICIAL_EPOCH_LENGTH iterations.
_EPOCHS = {
    "optim.epochs": "SOLVER.MAX_ITER",
    "optim.warmup_epochs": "SOLVER.WARMUP_ITERS",
    "optim.freeze_last_layer_epochs": "SOLVER.FREEZE_LAST_LAYER_ITERS",
    "teacher.warmup_teacher_temp_epochs": "MODEL.TEACHER.TEMP_WARMUP_ITERS",
}

# Words that are spelt otherwise: theirs -> ours.
_WORDS = {
    "student.arch": (
        "MODEL.VIT.SIZE",
        {"vit_small": "small", "vit_base": "base", "vit_large": "large", "vit_giant2": "giant"},
    ),
    "student.ffn_layer": ("MODEL.VIT.FFN", {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}),
    "optim.scaling_rule": ("SOLVER.LR_SCALING", {"sqrt_wrt_1024": "sqrt"}),
}

_SHARDING = {
    "sharding_strategy": "how a model is spread over GPUs is no part of a recipe here",
    "mixed_precision.param_dtype": "one precision for all parts: that of the student's backbone",
    "mixed_precision.reduce_dtype": "gradients are reduced as MODEL.DDP says",
    "mixed_precision.buffer_dtype": "buffers are fp32",
}
_NO_COUNTERPART = {
    "compute_precision.grad_scaler": "fp16 always has a gradient scaler here, bf16 and fp32 need none",
    **{
        f"compute_precision.{side}.{part}.{key}": reason
        for side in ("teacher", "student")
        for part in ("backbone", "dino_head", "ibot_head")
        for key, reason in _SHARDING.items()
    },
    "train.saveckp_freq": "nothing in the published code reads it",
    "train.cache_dataset": "nothing in the published code reads it",
    "train.seed": "the published code never sets it; set SEED",
    "student.block_chunks": "a detail of the published sharding, no part of the model",
    "optim.lr": "computed from optim.base_lr when a run starts",
    "evaluation.eval_period_iterations": "only saves a teacher there; to evaluate set TEST.EVAL_PERIOD and DATASETS.TEST",
}

_PLACEHOLDER = "folder:/path/to/images"
_DATASETS = ("ImageNet", "ImageNet22k")
_DINOV3_GROUPS = {"gram", "hrft", "distillation", "multidistillation", "checkpointing"}


class ImportedConfig(NamedTuple):
    """A translated config.

    Attributes:
        cfg: validated.
        text: a config file with every key that was translated, defaults of ours included.
        dropped: (key, reason) for each key of the YAML that has no counterpart, in the order of the file.
    """

    cfg: CfgNode
    text: str
    dropped: list[tuple[str, str]]


def import_dinov2_config(path: str, num_gpus: int | None) -> ImportedConfig:
    """Translate a DINOv2 training YAML; keys it does not have take the published defaults.

    Args:
        num_gpus: GPUs of the run that the YAML is for; the global batch is this many times ``train.batch_size_per_gpu``.

    Raises:
        FileNotFoundError: without the file.
        ConfigError: if it is not such a YAML, ``num_gpus`` is missing, or a value cannot be translated; lists all problems.
    """
    given = _read(path)
    values = {**_PUBLISHED, **given}
    where = f"DINOv2 config {path}"
    if num_gpus is None or num_gpus < 1:
        batch = values["train.batch_size_per_gpu"]
        raise ConfigError(
            where,
            [
                f"train.batch_size_per_gpu {batch} is per GPU: give the number of GPUs of that run (--num-gpus N, N >= 1)."
            ],
        )
    problems = [
        f"{key} is {value!r}; resolve it first (OmegaConf.to_yaml(cfg, resolve=True) writes such a file)."
        for key, value in values.items()
        if key in {*_PUBLISHED, *_RENAMED} and isinstance(value, str) and ("${" in value or value == "???")
    ]
    ours = {key: (value, source) for key, value, source in _translate(values, num_gpus, problems)}
    if problems:
        raise ConfigError(where, problems)
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(unflatten({key: value for key, (value, _) in ours.items()})))
    validate(cfg, num_gpus)
    origins = {key: source + " (published default)" * (source not in given) for key, (_, source) in ours.items()}
    origins = {key: "dinoengine" if key == "VERSION" else origin for key, origin in origins.items()}
    return ImportedConfig(
        cfg, _header(os.path.basename(path), num_gpus) + annotated_yaml(cfg, origins), list(_dropped(given))
    )


def _header(name: str, num_gpus: int) -> str:
    lines = (
        f"Imported from {name}; the comment behind each key is the key it comes from.",
        "",
        f"Source    {name}, completed with the published defaults",
        f"Command   python tools/train_net.py --config-file THIS_FILE --num-gpus {num_gpus} OUTPUT_DIR output/imported",
        "Expected  not known",
        f"Hardware  {num_gpus} GPU(s)",
    )
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _read(path: str) -> dict[str, Any]:
    """The keys of the file, dotted."""
    where = f"DINOv2 config {path}"
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(where, [f"not valid YAML: {error}"]) from None
    if not isinstance(content, dict):
        raise ConfigError(where, [f"expected a mapping of keys, got {type(content).__name__}."])
    if groups := sorted(_DINOV3_GROUPS & content.keys()):
        raise ConfigError(where, [f"this is no DINOv2 config: {', '.join(groups)} belong(s) to DINOv3's."])
    # A heading without keys (``crops:``) is no key.
    given = {key: value for key, value in flatten(content) if "." in key or value is not None}
    known = {*_PUBLISHED, *_RENAMED, *_NO_COUNTERPART}
    if not known & (given.keys() - {"MODEL.WEIGHTS"}):  # a key that other projects have too
        found = ", ".join(list(given)[:5]) or "none"
        raise ConfigError(
            where, [f"it has no key of DINOv2's (such as student.arch, optim.epochs); its keys: {found}."]
        )
    return given


def _dropped(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    known = [*_PUBLISHED, *_RENAMED, *_NO_COUNTERPART]
    for key, value in given.items():
        if key in _PUBLISHED or key in _RENAMED:
            continue
        if key in _NO_COUNTERPART:
            yield key, _NO_COUNTERPART[key]
        else:
            yield key, f"no key of the published code{suggest(key, known)}; its value is {value!r}"
    dataset = given.get("train.dataset_path", _PUBLISHED["train.dataset_path"])
    if _dataset(dataset) == _PLACEHOLDER:
        yield "train.dataset_path", f"{dataset!r} names no folder (root=); set DATASETS.TRAIN"


def _dataset(text: Any) -> str:
    """``ImageNet:split=TRAIN:root=/data:extra=/extra`` as it is; a placeholder for a string without root."""
    name, *pairs = str(text).split(":")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    return str(text) if name in _DATASETS and options.get("root") else _PLACEHOLDER


def _translate(values: dict[str, Any], num_gpus: int, problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    """(our key, value, their key); what cannot be translated is added to ``problems``."""
    for key, ours in _RENAMED.items():
        if key in values:
            yield ours, values[key], key
    for key, (ours, words) in _WORDS.items():
        word = str(values[key])
        if word not in words:
            problems.append(f"{key} {word!r} is not one of {', '.join(words)}.")
        yield ours, words.get(word, word), key
    yield "SOLVER.REFERENCE_BATCH_SIZE", 1024, "optim.scaling_rule"
    epoch = "train.OFFICIAL_EPOCH_LENGTH"
    length = _whole(values[epoch], epoch, problems)
    for key, ours in _EPOCHS.items():
        yield ours, _whole(values[key], f"{key} x {epoch}", problems, factor=length), key
    # The published code saves every three epochs and keeps three files; no key of it says so.
    yield "SOLVER.CHECKPOINT_PERIOD", 3 * length, epoch
    yield "SOLVER.CHECKPOINT_MAX_TO_KEEP", 3, epoch
    batch = "train.batch_size_per_gpu"
    per_gpu = _whole(values[batch], batch, problems)
    yield "SOLVER.IMS_PER_BATCH", per_gpu * num_gpus, batch
    yield "MODEL.LOSS.KOLEO_GROUP_SIZE", per_gpu, batch  # published: neighbours among the images of one GPU
    if per_gpu == 1 and values["dino.koleo_loss_weight"]:
        problems.append(
            f"{batch} 1 leaves KoLeo no second image on a GPU, so it trains nothing there: set dino.koleo_loss_weight to 0 "
            "in the file."
        )
    yield "MODEL.VIT.LAYER_SCALE_INIT", values["student.layerscale"] or 0.0, "student.layerscale"
    yield "SOLVER.BETAS", [values["optim.adamw_beta1"], values["optim.adamw_beta2"]], "optim.adamw_beta1"
    dtype = "compute_precision.student.backbone.mixed_precision.param_dtype"
    if values[dtype] not in ("fp16", "bf16", "fp32"):
        problems.append(f"{dtype} {values[dtype]!r} is not one of fp16, bf16, fp32.")
    yield "SOLVER.AMP.ENABLED", values[dtype] != "fp32", dtype
    if values[dtype] != "fp32":
        yield "SOLVER.AMP.PRECISION", values[dtype], dtype
    named = [key for key in ("MODEL.WEIGHTS", "student.pretrained_weights") if values[key]]
    if len(named) > 1:
        problems.append(f"{' and '.join(named)} both name weights; keep one.")
    for key in named:
        yield "MODEL.WEIGHTS", values[key], key
    yield "DATASETS.TRAIN", [_dataset(values["train.dataset_path"])], "train.dataset_path"


def _whole(value: Any, name: str, problems: list[str], factor: int = 1) -> int:
    """``value * factor`` as the whole number it must be."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value * factor != round(value * factor):
        problems.append(f"{name} must be a whole number, got {value!r}{f' x {factor}' if factor != 1 else ''}.")
        return 0
    return round(value * factor)
