"""A model for features from any weight file, without a config."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dinoengine.checkpoint.classifier_config import input_values
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.own import config_of
from dinoengine.checkpoint.weights import Weights
from dinoengine.config import CfgNode, cfg_from_text
from dinoengine.modeling import FeatureModel
from dinoengine.modeling.layers.pixel_norm import PixelNorm

_INPUT_KEYS = (
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.FORMAT",
    "INPUT.TEST.RESIZE_PX",
    "INPUT.TEST.CROP_SIZE_PX",
)


def load_backbone(
    path: str,
    device: torch.device | str = "cpu",
    *,
    layout: str = "auto",
    hints: Hints | None = None,
    allow: Sequence[str] = (),
) -> FeatureModel:
    """The (teacher's) backbone of a weight file, ready for images.

    model = load_backbone("dinov2_vits14_pretrain.pth")
    model.forward_features(images).cls_token     # images [B, C, H, W], uint8 or float in 0..1
    model.forward_last_blocks(images, 4)         # a BackboneOutput for each

    Args:
        path: a file or folder of any layout that MODEL.WEIGHTS takes.
        layout, hints: as in ``read_weights``.
        allow: patterns of entries that may be missing or unused.

    Returns:
        In eval mode, without gradient; pixels are normalised as the config in the file says, else in ImageNet's statistics.

    Raises:
        FileNotFoundError, CheckpointError: if it cannot be read, or has other entries than such a backbone.
    """
    weights = read_weights(path, layout, hints)
    weights.require_complete(path, allow)
    return feature_model(weights).to(device)


def feature_model(weights: Weights) -> FeatureModel:
    """As ``load_backbone``, of weights that have been read."""
    cfg = evaluation_config(weights)
    model = FeatureModel(PixelNorm(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD), weights.load_backbone())
    return model.eval().requires_grad_(False)


def evaluation_config(weights: Weights) -> CfgNode:
    """A config that builds the backbone, with the evaluation crop and pixel statistics that suit it.

    Those of the config in the file; else the published crop (224 of 256 pixels, or what the position table holds).
    """
    values = input_values(weights.spec, cfg_from_text(weights.config) if weights.config else None)
    cfg = config_of(weights.spec, weights.config)
    cfg.merge_from_list([word for key in _INPUT_KEYS for word in (key, values[key])])
    return cfg
