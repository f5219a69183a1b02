from __future__ import annotations

from dinoengine.config import get_cfg
from dinoengine.evaluation import HeadGrid, LinearSettings


def test_the_defaults_are_those_of_the_config_and_the_published_length() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.LINEAR.EPOCHS", 0.0, "TEST.LINEAR.ITERS", 12500])
    assert LinearSettings.from_config(cfg, 1_281_167) == LinearSettings()
    assert len(LinearSettings().grid.heads) == 52


def test_the_config_decides() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.LINEAR.BASE_LRS", (0.1,), "TEST.LINEAR.NUM_LAST_BLOCKS", (1,), "TEST.LINEAR.SEED", 3])
    cfg.merge_from_list(["TEST.LINEAR.MEAN_PATCH", (True,), "TEST.LINEAR.EPOCHS", 2.5, "TEST.LINEAR.IMS_PER_BATCH", 4])
    cfg.merge_from_list(["INPUT.TEST.CROP_SIZE_PX", (8,), "INPUT.CROP_RATIO", (1.0, 2.0), "TEST.LINEAR.CACHED", True])
    cfg.merge_from_list(["TEST.LINEAR.CROP_SCALE", (0.5, 1.0), "TEST.LINEAR.HFLIP_PROB", 0.25])
    cfg.merge_from_list(["TEST.LINEAR.VAL_PERIOD", 6, "TEST.LINEAR.CHECKPOINT_PERIOD", 7])
    assert LinearSettings.from_config(cfg, 11) == LinearSettings(
        grid=HeadGrid((0.1,), (1,), (True,)),
        num_iters=7,  # 27.5 images in batches of 4
        ims_per_batch=4,
        crop_size_px=(8,),
        crop_scale=(0.5, 1.0),
        crop_ratio=(1.0, 2.0),
        hflip_prob=0.25,
        seed=3,
        cached=True,
        val_period=6,
        checkpoint_period=7,
    )


def test_the_protocol_has_what_the_heads_depend_on_and_not_how_often_they_are_looked_at() -> None:
    settings = LinearSettings()
    assert settings.protocol() == LinearSettings(val_period=5, checkpoint_period=0).protocol()
    crops = {"crop_size_px": [224], "crop_scale": [0.08, 1.0], "crop_ratio": [0.75, 4 / 3], "hflip_prob": 0.5}
    assert settings.protocol()["augmentation"] == crops
    assert settings.protocol()["iterations"] == 12500
    assert LinearSettings(cached=True).protocol()["augmentation"] == "none: cached features of evaluation crops"
