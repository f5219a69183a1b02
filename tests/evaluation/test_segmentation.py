from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoengine.config import CfgNode, ConfigError, validate
from dinoengine.data import build_test_loader
from dinoengine.engine import SSLTrainer
from dinoengine.evaluation import build_evaluator, inference_on_dataset
from dinoengine.evaluation import segmentation as segmentation_module
from dinoengine.evaluation.segmentation import last_patch_tokens
from dinoengine.modeling import FeatureModel
from dinoengine.modeling.backbone import VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from tests.evaluation.dense_fakes import BrokenPatches, ColourPatches, ConstantPatches, use_masks


def _vit(depth: int = 4) -> FeatureModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=(32, 32), patch_size=8, embed_dim=16, depth=depth, num_heads=2)
    return FeatureModel(PixelNorm([0.5] * 3, [0.25] * 3), backbone).eval()


@pytest.fixture
def probe_cfg(tiny_cfg: CfgNode, tmp_path: Path) -> CfgNode:
    use_masks(tiny_cfg, tmp_path, "segmentation")
    keys = {"ITERS": 60, "IMS_PER_BATCH": 8, "BASE_LR": 0.1, "WARMUP_ITERS": 5, "RESIZE_RATIO": (1.0, 1.0)}
    tiny_cfg.merge_from_list([word for key, value in keys.items() for word in (f"TEST.SEGMENTATION.{key}", value)])
    return tiny_cfg


def _results(cfg: CfgNode, model: nn.Module) -> Any:
    test = cfg.DATASETS.TEST[0]
    return inference_on_dataset(model, build_test_loader(cfg, test), build_evaluator(cfg, test))["segmentation"]


def test_it_learns_from_features_that_tell_and_not_from_those_that_do_not(probe_cfg: CfgNode) -> None:
    good = _results(probe_cfg, ColourPatches())
    assert good["miou"] > 85
    assert good["pixel_accuracy"] > 93
    assert good == _results(probe_cfg, ColourPatches())
    constant = _results(probe_cfg, ConstantPatches())
    assert constant["miou"] < 35  # everything is background
    assert constant["pixel_accuracy"] > 50


def test_four_blocks_of_a_model_whose_gradients_stay_untouched(probe_cfg: CfgNode) -> None:
    constant = _results(probe_cfg, ConstantPatches())
    probe_cfg.merge_from_list(["TEST.SEGMENTATION.NUM_LAST_BLOCKS", 4])
    model = _vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert _results(probe_cfg, model)["miou"] > constant["miou"] + 25  # 75 and 24
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_tokens_of_several_blocks_stand_side_by_side() -> None:
    model, images = _vit(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens, grid = last_patch_tokens(model, images, 4)
        blocks = model.backbone.get_intermediate_layers(model.pixel_norm(images), 4)  # type: ignore[operator]
        assert (tokens.shape, grid) == ((2, 16, 64), (4, 4))
        for i, block in enumerate(blocks):
            torch.testing.assert_close(tokens[..., 16 * i : 16 * (i + 1)], block.patch_tokens)
        torch.testing.assert_close(last_patch_tokens(model, images, 1)[0], blocks[-1].patch_tokens)
    with pytest.raises(ValueError, match="NUM_LAST_BLOCKS 1, not 4"):
        last_patch_tokens(ColourPatches(), images, 4)
    with pytest.raises(ValueError, match=r"The backbone has 2 blocks; got the last 4"):
        last_patch_tokens(_vit(2), images, 4)


def test_features_that_are_not_finite_are_named(probe_cfg: CfgNode, tmp_path: Path) -> None:
    from PIL import Image

    probe_cfg.merge_from_list(["TEST.SEGMENTATION.ITERS", 1])
    path = tmp_path / "test" / "images" / "03.png"
    image = Image.open(path)
    image.putpixel((0, 0), (255, 255, 255))
    image.save(path)
    with pytest.raises(ValueError, match=r"The scores of 1 of 6 images are not finite, e\.g\. .*/test/images/03\.png"):
        _results(probe_cfg, BrokenPatches())


def test_training_features_that_are_not_finite_are_named_before_a_step_with_them(
    probe_cfg: CfgNode, tmp_path: Path
) -> None:
    from PIL import Image

    probe_cfg.merge_from_list(["TEST.SEGMENTATION.RESIZE_RATIO", (1.0, 1.0), "TEST.SEGMENTATION.HFLIP_PROB", 0.0])
    path = tmp_path / "train" / "images" / "04.png"
    Image.new("RGB", Image.open(path).size, (255, 255, 255)).save(path)
    with pytest.raises(
        ValueError, match=r"training features of 1 of \d+ images are not finite, e\.g\. .*/train/images/04\.png"
    ):
        _results(probe_cfg, BrokenPatches())


def test_evaluating_while_training_leaves_the_training_alone(probe_cfg: CfgNode) -> None:
    train, test = probe_cfg.DATASETS.TRAIN, probe_cfg.DATASETS.TEST
    probe_cfg.merge_from_list(["TEST.EVALUATORS", "('segmentation', 'dense_knn')", "SOLVER.MAX_ITER", 3])
    probe_cfg.merge_from_list(["TEST.SEGMENTATION.ITERS", 2, "TEST.EVAL_PERIOD", 1, "TEST.DENSE_KNN.TRAIN", train])
    probe_cfg.merge_from_list(["TEST.SEGMENTATION.TRAIN", train, "MODEL.VIT.DROP_PATH_RATE", 0.2])
    weights = []
    for datasets in (test, ()):
        cfg = probe_cfg.clone()
        cfg.DATASETS.TEST = datasets
        cfg.OUTPUT_DIR += str(len(datasets))
        trainer = SSLTrainer(cfg)
        trainer.resume_or_load(resume=False)
        results = trainer.train()
        assert results.keys() == ({"segmentation", "dense_knn"} if datasets else set())
        weights.append(trainer.bare_model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_every_key_arrives(probe_cfg: CfgNode) -> None:
    train = probe_cfg.DATASETS.TRAIN
    probe_cfg.DATASETS.TRAIN = ("synthetic:num_images=2",)
    settings = {
        "num_last_blocks": 4,
        "iters": 7,
        "ims_per_batch": 3,
        "base_lr": 0.5,
        "warmup_iters": 2,
        "weight_decay": 0.25,
        "resize_ratio": [0.75, 1.5],
        "hflip_prob": 0.125,
        "seed": 9,
    }
    for name, value in {"train": train, **settings}.items():
        probe_cfg.merge_from_list([f"TEST.SEGMENTATION.{name.upper()}", value])
    (evaluator,) = build_evaluator(probe_cfg, probe_cfg.DATASETS.TEST[0]).evaluators
    assert evaluator.protocol() == {"segmentation": {**settings, "num_train_images": 10}}
    loader, schedule = evaluator.train_batches, evaluator.schedule  # type: ignore[attr-defined]
    assert (schedule.iters, schedule.warmup_iters, schedule.base_lr, schedule.weight_decay) == (7, 2, 0.5, 0.25)
    assert (loader.batch_sampler.batch_size, loader.dataset.seed, loader.dataset.sampler.seed) == (3, 9, 9)
    assert (loader.dataset.crop.resize_ratio, loader.dataset.crop.hflip_prob) == ((0.75, 1.5), 0.125)


def test_a_batch_that_cannot_be_shared_is_refused(probe_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation_module.comm, "get_world_size", lambda: 3)
    with pytest.raises(
        ValueError, match=r"TEST\.SEGMENTATION\.IMS_PER_BATCH 8 is global and must be divisible by the 3"
    ):
        build_evaluator(probe_cfg, probe_cfg.DATASETS.TEST[0])


def test_keys_that_cannot_be_are_refused(probe_cfg: CfgNode) -> None:
    probe_cfg.TEST.SEGMENTATION.ITERS = 5
    with pytest.raises(ConfigError, match=r"WARMUP_ITERS 5 must be below TEST\.SEGMENTATION\.ITERS 5"):
        validate(probe_cfg)
    probe_cfg.merge_from_list(["TEST.SEGMENTATION.RESIZE_RATIO", "(2, 1)", "TEST.SEGMENTATION.NUM_LAST_BLOCKS", 3])
    with pytest.raises(
        ConfigError, match=r"(?s)NUM_LAST_BLOCKS must be one of 1, 4.*RESIZE_RATIO must be \(low, high\)"
    ):
        validate(probe_cfg)
