from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.checkpoint import Checkpointer
from dinoengine.config import CfgNode, ConfigError
from dinoengine.engine import DefaultPredictor, SSLTrainer


@pytest.fixture
def weights(tiny_cfg: CfgNode, tmp_path: Path) -> str:
    model = SSLTrainer.build_model(tiny_cfg)
    with torch.no_grad():
        for p in model.teacher.parameters():  # type: ignore[union-attr]
            p.add_(0.01)
    return Checkpointer(model, str(tmp_path / "weights")).save("w")


def test_the_predictor_gives_the_teachers_features(tiny_cfg: CfgNode, weights: str, tmp_path: Path) -> None:
    tiny_cfg.MODEL.WEIGHTS = weights
    tiny_cfg.MODEL.DEVICE = "auto"
    predictor = DefaultPredictor(tiny_cfg)
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    outputs = [
        predictor(x) for x in (array, Image.fromarray(array), str(tmp_path / "image.png"), tmp_path / "image.png")
    ]
    assert outputs[0].cls_token.shape == (1, 16)
    assert outputs[0].patch_tokens.shape == (1, 4, 16)
    assert all(torch.equal(o.cls_token, outputs[0].cls_token) for o in outputs)

    model = SSLTrainer.build_model(tiny_cfg)
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    expected = model.feature_model()(predictor.transform(Image.fromarray(array))[None])  # type: ignore[operator]
    torch.testing.assert_close(outputs[0].cls_token, expected.cls_token)


def test_the_predictor_needs_weights(tiny_cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS: is empty"):
        DefaultPredictor(tiny_cfg)
