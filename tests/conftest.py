"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinoengine.config import CfgNode, get_cfg

# Tiny tensors: threads cost more than they give, and several test processes may share the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VIT.SIZE": "micro",
    "MODEL.VIT.DEPTH": 1,
    "MODEL.VIT.EMBED_DIM": 16,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.PATCH_SIZE_PX": 4,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.VIT.LAYER_SCALE_INIT": 0.1,
    "MODEL.DINO_HEAD.NUM_PROTOTYPES": 16,
    "MODEL.DINO_HEAD.HIDDEN_DIM": 16,
    "MODEL.DINO_HEAD.BOTTLENECK_DIM": 8,
    "MODEL.IBOT_HEAD.NUM_PROTOTYPES": 16,
    "MODEL.IBOT_HEAD.HIDDEN_DIM": 16,
    "MODEL.IBOT_HEAD.BOTTLENECK_DIM": 8,
    "INPUT.GLOBAL_CROPS.SIZE_PX": 8,
    "INPUT.LOCAL_CROPS.SIZE_PX": 4,
    "INPUT.LOCAL_CROPS.NUM": 2,
    "INPUT.TEST.RESIZE_PX": 8,
    "INPUT.TEST.CROP_SIZE_PX": 8,
    "INPUT.BLUR.KERNEL_SIZE_PX": 3,
    "DATASETS.TRAIN": "synthetic:num_images=24:num_classes=3:size=12",
    "DATASETS.TEST": "synthetic:num_images=9:num_classes=3:size=12:seed=1",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 10,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.FREEZE_LAST_LAYER_ITERS": 1,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.LR_SCALING": "none",
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "MODEL.TEACHER.TEMP_WARMUP_ITERS": 4,
    "MODEL.TEACHER.MOMENTUM": 0.9,
    "TEST.KNN.K": "(1, 3)",
    "TEST.LINEAR.IMS_PER_BATCH": 12,
    "TEST.LINEAR.EPOCHS": 2,
    "TEST.LOGREG.NUM_C": 3,
    "TEST.LOGREG.TOL": 1e-4,
    "LOG.PERIOD": 2,
    "LOG.TENSORBOARD": False,
    "LOG.PROGRESS_BAR": False,
}


# On top of TINY: a classifier of its three classes.
TINY_CLASSIFIER = {
    "MODEL.META_ARCHITECTURE": "ImageClassifier",
    "MODEL.CLASSIFIER.NUM_CLASSES": 3,
    "INPUT.AUGMENTATION": "SingleCrop",
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WEIGHT_DECAY": 0.0,
    "SOLVER.WEIGHT_DECAY_END": 0.0,
    "TEST.EVALUATORS": "('classification',)",
}


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> CfgNode:
    """A config that trains an iteration in milliseconds; OUTPUT_DIR is a fresh folder."""
    cfg = get_cfg()
    cfg.merge_from_list([word for key, value in TINY.items() for word in (key, str(value))])
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg


@pytest.fixture
def classifier_cfg(tiny_cfg: CfgNode) -> CfgNode:
    """The same for a classifier on a frozen backbone."""
    tiny_cfg.merge_from_list([word for key, value in TINY_CLASSIFIER.items() for word in (key, str(value))])
    return tiny_cfg


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    """Undo what a test sets up on the project's logger: handlers of one test must not write into the next."""
    logger = logging.getLogger("dinoengine")
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    for handler in logger.handlers:
        if handler not in before[0]:
            handler.close()
    logger.handlers, logger.propagate = list(before[0]), before[1]
    logger.setLevel(before[2])
