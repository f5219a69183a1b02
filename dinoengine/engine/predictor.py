"""Prediction for one image."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn

from dinoengine.config import CfgNode
from dinoengine.data import CenterCropTransform
from dinoengine.data.array_images import read_channels
from dinoengine.data.channels import Channels, image_format
from dinoengine.data.decode import read_image
from dinoengine.engine.config_loading import fit_config_to_weights
from dinoengine.engine.defaults import DefaultTrainer
from dinoengine.engine.evaluation_weights import load_weights_for_evaluation
from dinoengine.evaluation import inference_context
from dinoengine.structures import BackboneOutput


class DefaultPredictor:
    """One image in, features out.

    predictor = DefaultPredictor(cfg)           # MODEL.WEIGHTS, MODEL.DEVICE, INPUT.TEST
    cls_token = predictor("cat.jpg").cls_token  # [1, D]
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: e.g. the config.yaml of a run, with MODEL.WEIGHTS set.

        Raises:
            ConfigError: if MODEL.WEIGHTS is empty.
        """
        cfg = cfg.clone()
        cfg.defrost()
        if cfg.MODEL.DEVICE == "auto":
            cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        fit_config_to_weights(cfg)
        model = DefaultTrainer.build_model(cfg)
        load_weights_for_evaluation(cfg, model, resume=False)
        self.model: nn.Module = model.feature_model()  # type: ignore[operator]
        crop = cfg.INPUT.TEST.CROP_SIZE_PX
        self.max_image_pixels = cfg.DATALOADER.MAX_IMAGE_PIXELS
        self.transform = CenterCropTransform(image_format(cfg), cfg.INPUT.TEST.RESIZE_PX, (crop[0], crop[-1]))

    def __call__(self, image: Any) -> BackboneOutput:
        """
        Args:
            image: a path, a PIL image, or an array [H, W] or [H, W, C]: uint8 in RGB order or, with INPUT.FORMAT channels,
                values as they are stored in files.

        Returns:
            Tokens for a batch of one, on the model's device.

        Raises:
            TypeError: for an array of another type.
            ValueError: for one that has other channels than the model.
            UnreadableImageError: for a file that cannot be used as an image.
        """
        wanted = self.transform.image_format
        if isinstance(image, (str, os.PathLike)):
            path = os.fspath(image)
            if isinstance(wanted, Channels):
                image = read_channels(path, wanted.count, self.max_image_pixels)
            else:
                image = read_image(path, self.max_image_pixels)
        elif isinstance(image, np.ndarray) and not isinstance(wanted, Channels):
            if image.dtype != np.uint8:
                raise TypeError(f"An image array must be uint8 (0..255), got {image.dtype}; scale and round it first.")
            from PIL import Image

            image = Image.fromarray(image)
        device = next(self.model.parameters()).device
        with inference_context(self.model):
            output: BackboneOutput = self.model(self.transform(image)[None].to(device))
        return output
