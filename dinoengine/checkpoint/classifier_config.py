"""The config that trains or evaluates a classifier made from a backbone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from dinoengine.checkpoint.heads import HeadShape
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.config import CfgNode, get_cfg, key_origins, validate
from dinoengine.config.config import flatten, unflatten
from dinoengine.config.pixels import assumed_format

_PUBLISHED_CROP_PX = 224
_PUBLISHED_RESIZE_PX = 256

_SHARED = {
    "SOLVER.IMS_PER_BATCH": 1024,
    "SOLVER.MAX_ITER": 12500,
    "SOLVER.LR_SCALING": "linear",
    "SOLVER.REFERENCE_BATCH_SIZE": 256,
    "SOLVER.FREEZE_LAST_LAYER_ITERS": 0,
    "SOLVER.PATCH_EMBED_LR_MULT": 1.0,
    "SOLVER.CLIP_GRAD_NORM": 0.0,
    "SOLVER.CHECKPOINT_PERIOD": 1250,
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": 1,
}
# mode -> the keys in which it differs from the defaults, which are those of pretraining
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "MODEL.VIT.DROP_PATH_RATE": 0.0,
        "MODEL.CLASSIFIER.FREEZE_BACKBONE": True,
        "MODEL.CLASSIFIER.LABEL_SMOOTHING": 0.0,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.MOMENTUM": 0.9,
        **_SHARED,
        "SOLVER.BASE_LR": 5e-3,
        "SOLVER.MIN_LR": 0.0,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.LAYER_DECAY": 1.0,
        "SOLVER.WEIGHT_DECAY": 0.0,
        "SOLVER.WEIGHT_DECAY_END": 0.0,
    },
    "finetune": {
        "MODEL.VIT.DROP_PATH_RATE": 0.1,
        "MODEL.CLASSIFIER.FREEZE_BACKBONE": False,
        "MODEL.CLASSIFIER.LABEL_SMOOTHING": 0.1,
        "MODEL.CLASSIFIER.MIXUP_ALPHA": 0.0,
        "MODEL.CLASSIFIER.CUTMIX_ALPHA": 0.0,
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BETAS": (0.9, 0.999),
        **_SHARED,
        "SOLVER.BASE_LR": 1.25e-4,
        "SOLVER.MIN_LR": 1e-6,
        "SOLVER.WARMUP_ITERS": 625,
        "SOLVER.LAYER_DECAY": 0.75,
        "SOLVER.WEIGHT_DECAY": 0.05,
        "SOLVER.WEIGHT_DECAY_END": 0.05,
    },
}
_HEADERS = {
    "linear": """\
# Linear evaluation of a classifier on a frozen backbone.
#
# Source    the protocol of DINOv2 (arXiv:2304.07193): SGD, 12,500 iterations of 1,024 images, LR in proportion to the
#           batch, cosine to 0, no weight decay, random crops and flips. There 13 learning rates from 1e-5 to 0.1 (per 256
#           images) are trained and the best on the validation set counts; SOLVER.BASE_LR below is one of them, untuned.
""",
    "finetune": """\
# Full fine-tuning of a classifier.
#
# Source    after the fine-tuning of MAE (arXiv:2111.06377, Table 9): AdamW, layer decay, weight decay 0.05, label smoothing
#           0.1, stochastic depth 0.1; without its RandAugment, and therefore shorter (a tenth of its 100 epochs of
#           ImageNet) and with a lower LR. Length and LR are ours and untuned. Its mixup of 0.8 and cutmix of 1.0 are for
#           long trainings: set MODEL.CLASSIFIER.MIXUP_ALPHA and CUTMIX_ALPHA with a longer SOLVER.MAX_ITER.
""",
}


def classifier_config(
    spec: BackboneSpec,
    head: HeadShape,
    mode: str,
    *,
    weights_path: str,
    output_dir: str,
    source_cfg: CfgNode | None = None,
    train: Sequence[str] = (),
    test: Sequence[str] = (),
    overrides: Sequence[Any] = (),
) -> tuple[CfgNode, list[str]]:
    """The whole config, and the keys that its file is to state.

    Args:
        mode: a name in RECIPES.
        source_cfg: of the run the backbone comes from: its pixel statistics, image format, flips and evaluation crop are
            kept. None: RGB or grey images in ImageNet's statistics, and the published crop of 224 pixels or the largest
            that the position table holds.
        overrides: KEY VALUE words that win over everything.

    Raises:
        ConfigError: if the result cannot be run.
    """
    values: dict[str, Any] = {"MODEL.META_ARCHITECTURE": "ImageClassifier", "MODEL.WEIGHTS": weights_path}
    values |= input_values(spec, source_cfg)
    values |= spec.config_options()
    values |= {f"MODEL.CLASSIFIER.{name.upper()}": value for name, value in head._asdict().items()}
    values |= RECIPES[mode]
    values |= {"DATASETS.TRAIN": tuple(train), "DATASETS.TEST": tuple(test), "TEST.EVALUATORS": ("classification",)}
    values |= {"TEST.EVAL_PERIOD": 1250} if test else {}
    values["OUTPUT_DIR"] = output_dir
    cfg = get_cfg()
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    cfg.merge_from_list(overrides)
    # Data that are still to be named are no reason to refuse the rest.
    checked = cfg.clone()
    checked.DATASETS.TRAIN = cfg.DATASETS.TRAIN or ("named later",)
    validate(checked)
    from_overrides = [key for key, origin in key_origins(cfg, "", overrides).items() if origin == "command line"]
    return cfg, list(dict.fromkeys([*values, *from_overrides]))


def config_file_text(
    cfg: CfgNode, keys: Sequence[str], mode: str, spec: BackboneSpec, head: HeadShape, source: str, config_path: str
) -> str:
    """A YAML file of these keys, with a header that says what it is and how to run it."""
    command = f"python tools/train_net.py --config-file {shlex.quote(config_path)}"
    data = "" if cfg.DATASETS.TRAIN else " DATASETS.TRAIN folder:/path/to/train DATASETS.TEST folder:/path/to/val"
    lines = [
        f"# Backbone  {spec.describe()}",
        f"# Head      {head.describe()}",
        f"# Weights   {cfg.MODEL.WEIGHTS}, made by tools/convert_to_classifier.py from {source}",
        f"# Command   {command}{data}",
        f"# Evaluate  {command}{data} --eval-only MODEL.WEIGHTS {shlex.quote(f'{cfg.OUTPUT_DIR}/model_final.pth')}",
    ]
    values = dict(flatten(cfg))
    body = CfgNode(unflatten({key: values[key] for key in keys})).dump()
    return _HEADERS[mode] + "\n".join(lines) + "\n" + body


def input_values(spec: BackboneSpec, source_cfg: CfgNode | None) -> dict[str, Any]:
    """Pixels and crops; the training crop has the size of the evaluation crop.

    Those of ``source_cfg`` if it has as many channels; else ImageNet's statistics (0.5 for other than three channels), and
    the published crop of 224 pixels or the largest that the position table holds.
    """
    if source_cfg is not None and len(source_cfg.MODEL.PIXEL_MEAN) == spec.in_chans:
        mean, std = source_cfg.MODEL.PIXEL_MEAN, source_cfg.MODEL.PIXEL_STD
        image_format, flips = source_cfg.INPUT.FORMAT, source_cfg.INPUT.HFLIP_PROB
        value_range = source_cfg.INPUT.VALUE_RANGE
        crop, resize = source_cfg.INPUT.TEST.CROP_SIZE_PX, source_cfg.INPUT.TEST.RESIZE_PX
    else:
        defaults = get_cfg()
        mean, std = defaults.MODEL.PIXEL_MEAN, defaults.MODEL.PIXEL_STD
        if spec.in_chans != len(mean):
            mean = std = (0.5,) * spec.in_chans  # pixels in -1..1
        image_format, value_range = assumed_format(spec.in_chans).values()
        flips = defaults.INPUT.HFLIP_PROB
        crop = tuple(_multiple(min(_PUBLISHED_CROP_PX, edge), spec.patch_size) for edge in spec.img_size)
        resize = round(min(crop) * _PUBLISHED_RESIZE_PX / _PUBLISHED_CROP_PX)
    return {
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "INPUT.FORMAT": image_format,
        "INPUT.VALUE_RANGE": value_range,
        "INPUT.AUGMENTATION": "SingleCrop",
        "INPUT.GLOBAL_CROPS.SIZE_PX": crop,
        "INPUT.GLOBAL_CROPS.SCALE": (0.08, 1.0),
        "INPUT.HFLIP_PROB": flips,
        "INPUT.TEST.RESIZE_PX": resize,
        "INPUT.TEST.CROP_SIZE_PX": crop,
    }


def _multiple(edge: int, patch: int) -> int:
    return edge // patch * patch
