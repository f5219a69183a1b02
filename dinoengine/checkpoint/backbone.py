"""A model for features from any weight file, without a config."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from dinoengine.checkpoint.classifier_config import input_values
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.own import Own, config_of
from dinoengine.checkpoint.weights import Weights
from dinoengine.config import CfgNode, cfg_from_text
from dinoengine.config.pixels import PIXEL_KEYS
from dinoengine.modeling import FeatureModel
from dinoengine.modeling.layers.pixel_norm import PixelNorm

logger = logging.getLogger(__name__)

_INPUT_KEYS = (*PIXEL_KEYS, "INPUT.TEST.RESIZE_PX", "INPUT.TEST.CROP_SIZE_PX")


def load_backbone(
    path: str,
    device: torch.device | str = "cpu",
    *,
    layout: str = "auto",
    hints: Hints | None = None,
    allow: Sequence[str] = (),
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> FeatureModel:
    """The (teacher's) backbone of a weight file, ready for images.

    model = load_backbone("dinov2_vits14_pretrain.pth")
    model.forward_features(images).cls_token     # images [B, C, H, W], uint8 or float in 0..1
    model.forward_last_blocks(images, 4)         # a BackboneOutput for each

    Args:
        path: a file or folder of any layout that MODEL.WEIGHTS takes.
        layout, hints: as in ``read_weights``.
        allow: patterns of entries that may be missing or unused.
        pixel_mean, pixel_std: as in ``evaluation_config``.

    Returns:
        In eval mode, without gradient; pixels are normalised as the config in the file says, else in ImageNet's statistics.

    Raises:
        FileNotFoundError, CheckpointError: if it cannot be read, or has other entries than such a backbone.
        ValueError: for pixel statistics that do not fit.
    """
    weights = read_weights(path, layout, hints)
    weights.require_complete(path, allow)
    return feature_model(weights, evaluation_config(weights, path, pixel_mean, pixel_std)).to(device)


def feature_model(weights: Weights, cfg: CfgNode) -> FeatureModel:
    """As ``load_backbone``, of weights that have been read and their ``evaluation_config``."""
    model = FeatureModel(PixelNorm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD), weights.load_backbone())
    return model.eval().requires_grad_(False)


def evaluation_config(
    weights: Weights,
    path: str,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> CfgNode:
    """A config that builds the backbone, with the evaluation crop and pixel statistics that suit it.

    Those of the config in the file; else the published crop (224 of 256 pixels, or what the position table holds) and
    ImageNet's statistics (0.5 for other than three channels), which is said: loudly for a checkpoint of our own, whose run
    may have had any.

    Args:
        path: of the weights, for messages.
        pixel_mean, pixel_std: one number per channel, for pixels in 0..1; they win over what the file says, with a warning
            if the config in the file says otherwise.

    Raises:
        ValueError: for another number of values than channels, one that is not finite, or a std that is not above 0.
    """
    values = input_values(weights.spec, cfg_from_text(weights.config) if weights.config else None)
    for key, given in (("MODEL.PIXEL_MEAN", pixel_mean), ("MODEL.PIXEL_STD", pixel_std)):
        if given is not None:
            of_file, values[key] = tuple(values[key]), _pixel_values(key, given, weights.spec.in_chans)
            if weights.config and values[key] != of_file:
                logger.warning(
                    "OTHER PIXELS: %s was trained with %s %s, and %s is asked for.", path, key, of_file, given
                )
    cfg = config_of(weights.spec, weights.config)
    cfg.merge_from_list([word for key in _INPUT_KEYS for word in (key, values[key])])
    if not weights.config and (pixel_mean is None or pixel_std is None):
        _say_assumed_pixels(weights, cfg, path)
    return cfg


def _pixel_values(key: str, given: Sequence[float], num_channels: int) -> tuple[float, ...]:
    is_std = key.endswith("STD")
    if len(given) != num_channels or not all(math.isfinite(v) and (v > 0 or not is_std) for v in given):
        numbers = "finite numbers above 0" if is_std else "finite numbers"
        raise ValueError(
            f"{key.removeprefix('MODEL.').lower()} takes {numbers}, one for each of the {num_channels} channel(s) of the "
            f"model; got {tuple(given)}."
        )
    return tuple(given)


def _say_assumed_pixels(weights: Weights, cfg: CfgNode, path: str) -> None:
    """Published models are trained with the statistics assumed here; of a run of our own nothing is known."""
    is_own_run = weights.layout == Own.name and not weights.states_shape
    logger.log(
        logging.WARNING if is_own_run else logging.INFO,
        "%s%s: no config in the file says how pixels are normalised. ASSUMED: mean %s, std %s, format %s. With other "
        "statistics than those of its training a model gives poor features: give them by --pixel-mean and --pixel-std "
        "(extract_features.py), or pixel_mean= and pixel_std= (load_backbone).",
        "PIXEL STATISTICS UNKNOWN. " if is_own_run else "",
        path,
        tuple(cfg.MODEL.PIXEL_MEAN),
        tuple(cfg.MODEL.PIXEL_STD),
        cfg.INPUT.FORMAT,
    )
