from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dinoengine.checkpoint.classifier_config import classifier_config, config_file_text
from dinoengine.checkpoint.heads import HeadShape
from dinoengine.checkpoint.weights import BackboneSpec
from dinoengine.config import CfgNode, get_cfg, validate
from dinoengine.modeling.backbone import VisionTransformer
from dinoengine.solver import build_lr_scheduler, scaled_lr
from tests.checkpoint.models import SMALL, WITH_REGISTERS

HEAD = HeadShape(1000, 4, True)
VITS14 = replace(SMALL, embed_dim=384, depth=12, num_heads=6, patch_size=14, table_grid=(37, 37), ffn_hidden=1536)


def _config(mode: str = "linear", spec: BackboneSpec = VITS14, **options: Any) -> CfgNode:
    options = {"weights_path": "/w/cls.pth", "output_dir": "/w/cls", "train": ["folder:/t"], **options}
    return classifier_config(spec, HEAD, mode, **options)[0]


def test_linear_evaluation_is_the_published_one() -> None:
    cfg = _config()
    solver, inputs = cfg.SOLVER, cfg.INPUT
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.MAX_ITER, solver.IMS_PER_BATCH) == ("SGD", 0.9, 12500, 1024)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_END, solver.WARMUP_ITERS, solver.MIN_LR) == (0, 0, 0, 0)
    assert scaled_lr(1e-5, 1024, solver.REFERENCE_BATCH_SIZE, solver.LR_SCALING) == pytest.approx(4e-5)
    grid = [factor * 10.0**power for power in range(-5, -1) for factor in (1, 2, 5)] + [0.1]
    assert min(abs(solver.BASE_LR - lr) for lr in grid) < 1e-12
    assert (inputs.GLOBAL_CROPS.SIZE_PX, inputs.GLOBAL_CROPS.SCALE, inputs.HFLIP_PROB) == ((224, 224), (0.08, 1.0), 0.5)
    assert (inputs.TEST.RESIZE_PX, inputs.TEST.CROP_SIZE_PX) == (256, (224, 224))
    assert (
        CfgNode(
            {
                "NUM_CLASSES": 1000,
                "NUM_LAST_BLOCKS": 4,
                "MEAN_PATCH": True,
                "FREEZE_BACKBONE": True,
                "LABEL_SMOOTHING": 0.0,
                "MIXUP_ALPHA": 0.0,
                "CUTMIX_ALPHA": 0.0,
            }
        )
        == cfg.MODEL.CLASSIFIER
    )
    assert build_lr_scheduler(cfg, _NoGroups()).apply(0)["lr"] == pytest.approx(cfg.SOLVER.BASE_LR * 4)


class _NoGroups:
    param_groups: list[Any] = []  # noqa: RUF012


def test_fine_tuning_trains_the_backbone_with_layer_decay() -> None:
    cfg = _config("finetune")
    assert not cfg.MODEL.CLASSIFIER.FREEZE_BACKBONE
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.LAYER_DECAY, cfg.SOLVER.WEIGHT_DECAY_END) == ("AdamW", 0.75, 0.05)
    assert (cfg.MODEL.VIT.DROP_PATH_RATE, cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING) == (0.1, 0.1)
    assert (cfg.MODEL.CLASSIFIER.MIXUP_ALPHA, cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA) == (0, 0)  # stated, for long ones


@pytest.mark.parametrize("mode", ["linear", "finetune"])
@pytest.mark.parametrize("spec", [SMALL, WITH_REGISTERS, VITS14, replace(SMALL, layer_scale=False, table_grid=(2, 5))])
def test_the_config_is_valid_and_builds_the_backbone(mode: str, spec: BackboneSpec) -> None:
    cfg = _config(mode, spec)
    assert validate(cfg) == []
    arguments = VisionTransformer.from_config(cfg)
    assert arguments["img_size"] == spec.img_size
    assert (arguments["interpolate_antialias"], arguments["interpolate_offset"]) == (
        spec.interpolate_antialias,
        spec.interpolate_offset,
    )
    assert bool(arguments["layer_scale_init"]) == spec.layer_scale
    assert tuple(min(224, edge) for edge in spec.img_size) == cfg.INPUT.TEST.CROP_SIZE_PX


def test_the_crop_is_a_multiple_of_the_patch() -> None:
    cfg = _config(spec=replace(VITS14, patch_size=15))
    assert (cfg.INPUT.GLOBAL_CROPS.SIZE_PX, cfg.INPUT.TEST.RESIZE_PX) == ((210, 210), 240)


def test_one_channel_means_grey_images() -> None:
    cfg = _config(spec=replace(VITS14, in_chans=1))
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ("L", (0.5,), (0.5,))
    cfg = _config(spec=replace(VITS14, in_chans=2))
    assert (cfg.INPUT.FORMAT, cfg.INPUT.VALUE_RANGE, cfg.MODEL.PIXEL_MEAN) == ("channels", (0, 255), (0.5, 0.5))


def test_the_file_gives_back_the_config_and_says_how_to_run_it(tmp_path: Any) -> None:
    options: dict[str, Any] = {"weights_path": "/w/a b.pth", "output_dir": "/w/a b"}
    overrides = ["SOLVER.MAX_ITER", 20, "LOG.PERIOD=1", "TEST.IMS_PER_BATCH=256"]
    cfg, keys = classifier_config(VITS14, HEAD, "linear", **options, test=["folder:/v"], overrides=overrides)
    assert set(keys[-2:]) == {"TEST.IMS_PER_BATCH", "LOG.PERIOD"}  # also one that is the default
    text = config_file_text(cfg, keys, "linear", VITS14, HEAD, "in.pth", "a b.yaml")
    (tmp_path / "config.yaml").write_text(text)
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again == cfg
    assert "# Head      1000 classes from the CLS token of each of the last 4 blocks and the mean patch token" in text
    command = "# Command   python tools/train_net.py --config-file 'a b.yaml' DATASETS.TRAIN folder:/path/to/train"
    assert command in text
    assert "--eval-only MODEL.WEIGHTS '/w/a b/model_final.pth'\n" in text
    named = config_file_text(_config(), keys, "linear", VITS14, HEAD, "in.pth", "c.yaml")
    assert "# Command   python tools/train_net.py --config-file c.yaml\n" in named
