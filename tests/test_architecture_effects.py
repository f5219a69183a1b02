"""Every config key does what its comment in defaults.py says about results: three iterations with and without it.

A key that is read and then ignored passes every check of the source; it does not pass this one.
"""

from __future__ import annotations

import math
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dinoengine.config import CfgNode, get_cfg, validate
from dinoengine.engine import HookBase, SSLTrainer, hooks
from tests.conftest import TINY
from tests.test_architecture import _keys
from tests.tools.test_generate_config_docs import docs

Overrides = dict[str, Any]

# On top of conftest's TINY: three steps (the first has LR 0) on two images each, without evaluation.
BASE: Overrides = {
    "SOLVER.MAX_ITER": 3,
    "LOG.PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 2,
    "DATASETS.TEST": "()",
}
SEPARATE: Overrides = {
    "MODEL.IBOT_HEAD.SEPARATE": True,
    "MODEL.IBOT_HEAD.NUM_PROTOTYPES": 16,
    "MODEL.IBOT_HEAD.HIDDEN_DIM": 16,
    "MODEL.IBOT_HEAD.BOTTLENECK_DIM": 8,
}
JITTER: Overrides = {"INPUT.COLOR_JITTER.PROB": 1.0}
BLUR: Overrides = {"INPUT.BLUR.PROBS": "(1.0, 1.0, 1.0)"}
GRID_8X8: Overrides = {"INPUT.GLOBAL_CROPS.SIZE_PX": 32, "INPUT.MASK.RATIO": "(0.3, 0.5)"}
MIXTURE: Overrides = {"DATASETS.TRAIN": "('synthetic:num_images=6:size=12', 'synthetic:num_images=6:size=12:seed=1')"}
EVALUATE: Overrides = {"DATASETS.TEST": TINY["DATASETS.TEST"], "TEST.EVAL_PERIOD": 1}


class Change(NamedTuple):
    """Another value of a key, and the settings under which it is compared with the default one."""

    value: Any
    context: Overrides = {}  # noqa: RUF012 - never written to


CHANGES_TRAINING: dict[str, Change] = {
    "SEED": Change(1),
    "MODEL.PIXEL_MEAN": Change("(0.1, 0.2, 0.3)"),
    "MODEL.PIXEL_STD": Change("(0.5, 0.5, 0.5)"),
    "SOLVER.AMP.PRECISION": Change("fp32", {"SOLVER.AMP.ENABLED": True}),
    "MODEL.VIT.SIZE": Change("tiny", {"MODEL.VIT.EMBED_DIM": 0}),
    "MODEL.VIT.EMBED_DIM": Change(32),
    "MODEL.VIT.DEPTH": Change(2),
    "MODEL.VIT.NUM_HEADS": Change(4),
    "MODEL.VIT.PATCH_SIZE_PX": Change(2),
    "MODEL.VIT.POS_EMBED_SIZE_PX": Change(16),
    "MODEL.VIT.NUM_REGISTER_TOKENS": Change(2),
    "MODEL.VIT.FFN": Change("swiglu"),
    "MODEL.VIT.FFN_RATIO": Change(2.0),
    "MODEL.VIT.QKV_BIAS": Change(False),
    "MODEL.VIT.PROJ_BIAS": Change(False),
    "MODEL.VIT.FFN_BIAS": Change(False),
    "MODEL.VIT.LAYER_SCALE_INIT": Change(0.5),
    "MODEL.VIT.DROP_PATH_RATE": Change(0.5),
    "MODEL.VIT.DROP_PATH_UNIFORM": Change(False, {"MODEL.VIT.DROP_PATH_RATE": 0.5, "MODEL.VIT.DEPTH": 2}),
    "MODEL.VIT.INTERPOLATE_ANTIALIAS": Change(True, {"INPUT.GLOBAL_CROPS.SIZE_PX": 16, "INPUT.LOCAL_CROPS.SIZE_PX": 8}),
    "MODEL.VIT.INTERPOLATE_OFFSET": Change(0.0, {"INPUT.GLOBAL_CROPS.SIZE_PX": 16, "INPUT.LOCAL_CROPS.SIZE_PX": 8}),
    "MODEL.DINO_HEAD.NUM_PROTOTYPES": Change(8),
    "MODEL.DINO_HEAD.HIDDEN_DIM": Change(8),
    "MODEL.DINO_HEAD.BOTTLENECK_DIM": Change(4),
    "MODEL.DINO_HEAD.NUM_LAYERS": Change(2),
    "MODEL.IBOT_HEAD.SEPARATE": Change(False, SEPARATE),
    "MODEL.IBOT_HEAD.NUM_PROTOTYPES": Change(8, SEPARATE),
    "MODEL.IBOT_HEAD.HIDDEN_DIM": Change(8, SEPARATE),
    "MODEL.IBOT_HEAD.BOTTLENECK_DIM": Change(4, SEPARATE),
    "MODEL.IBOT_HEAD.NUM_LAYERS": Change(2, SEPARATE),
    "MODEL.TEACHER.MOMENTUM": Change(0.5),
    "MODEL.TEACHER.MOMENTUM_END": Change(0.95),
    "MODEL.TEACHER.WARMUP_TEMP": Change(0.06),
    "MODEL.TEACHER.TEMP": Change(0.1),
    "MODEL.TEACHER.TEMP_WARMUP_ITERS": Change(2),
    "MODEL.LOSS.CENTERING": Change("sinkhorn_knopp"),
    "MODEL.LOSS.CENTER_MOMENTUM": Change(0.5),
    "MODEL.LOSS.SINKHORN_ITERS": Change(1, {"MODEL.LOSS.CENTERING": "sinkhorn_knopp"}),
    "MODEL.LOSS.STUDENT_TEMP": Change(0.2),
    "MODEL.LOSS.DINO_WEIGHT": Change(0.5),
    "MODEL.LOSS.IBOT_WEIGHT": Change(0.5),
    "MODEL.LOSS.KOLEO_WEIGHT": Change(0.5),
    "MODEL.LOSS.KOLEO_GROUP_SIZE": Change(2, {"SOLVER.IMS_PER_BATCH": 4}),
    "INPUT.CROP_RATIO": Change("(1.0, 1.0)"),
    "INPUT.GLOBAL_CROPS.SIZE_PX": Change(16),
    "INPUT.GLOBAL_CROPS.SCALE": Change("(0.9, 1.0)"),
    "INPUT.LOCAL_CROPS.NUM": Change(1),
    "INPUT.LOCAL_CROPS.SIZE_PX": Change(8),
    "INPUT.LOCAL_CROPS.SCALE": Change("(0.4, 0.5)"),
    "INPUT.HFLIP_PROB": Change(0.0),
    "INPUT.COLOR_JITTER.PROB": Change(0.0),
    "INPUT.COLOR_JITTER.BRIGHTNESS": Change(0.1, JITTER),
    "INPUT.COLOR_JITTER.CONTRAST": Change(0.1, JITTER),
    "INPUT.COLOR_JITTER.SATURATION": Change(0.9, JITTER),
    "INPUT.COLOR_JITTER.HUE": Change(0.4, JITTER),
    "INPUT.GRAYSCALE_PROB": Change(1.0),
    "INPUT.BLUR.PROBS": Change("(1.0, 0.0, 0.0)"),
    "INPUT.BLUR.KERNEL_SIZE_PX": Change(5, BLUR),
    "INPUT.BLUR.SIGMA_PX": Change("(2.0, 3.0)", BLUR),
    "INPUT.SOLARIZE.PROBS": Change("(1.0, 1.0, 0.0)"),
    "INPUT.SOLARIZE.THRESHOLD": Change(10, {"INPUT.SOLARIZE.PROBS": "(1.0, 1.0, 1.0)"}),
    "INPUT.MASK.CROP_SHARE": Change(1.0, GRID_8X8),
    "INPUT.MASK.RATIO": Change("(0.6, 0.9)", GRID_8X8),
    "INPUT.MASK.MIN_BLOCK_PATCHES": Change(1, GRID_8X8),
    "INPUT.MASK.MIN_ASPECT": Change(1.0, GRID_8X8),
    "DATASETS.TRAIN": Change("synthetic:num_images=24:num_classes=3:size=12:seed=7"),
    "DATALOADER.SAMPLER": Change("class_balanced"),
    "SOLVER.IMS_PER_BATCH": Change(4),
    "SOLVER.MAX_ITER": Change(4),
    "SOLVER.BASE_LR": Change(0.02),
    "SOLVER.LR_SCALING": Change("sqrt"),
    "SOLVER.REFERENCE_BATCH_SIZE": Change(4, {"SOLVER.LR_SCALING": "linear"}),
    "SOLVER.MIN_LR": Change(0.005, {"SOLVER.WARMUP_ITERS": 1}),
    "SOLVER.WARMUP_ITERS": Change(1),
    "SOLVER.FREEZE_LAST_LAYER_ITERS": Change(2),
    "SOLVER.BACKBONE_FREEZE_ITERS": Change(2),
    "SOLVER.BACKBONE_RAMP_ITERS": Change(3),
    "SOLVER.LAYER_DECAY": Change(0.5),
    "SOLVER.PATCH_EMBED_LR_MULT": Change(0.5),
    "SOLVER.WEIGHT_DECAY": Change(0.2),
    "SOLVER.WEIGHT_DECAY_END": Change(0.8),
    "SOLVER.BETAS": Change("(0.5, 0.9)"),
    "SOLVER.EPS": Change(0.01),
    "SOLVER.MOMENTUM": Change(0.5, {"SOLVER.OPTIMIZER": "SGD"}),
    "SOLVER.CLIP_GRAD_NORM": Change(0.01),
    "SOLVER.REFERENCE_WORLD_SIZE": Change(2),
    "SOLVER.AMP.ENABLED": Change(True),
    "DATASETS.TRAIN_WEIGHTS": Change("(1, 3)", MIXTURE),
}

LEAVES_TRAINING_ALONE: dict[str, Change] = {
    "MODEL.ACTIVATION_CHECKPOINTING": Change("full"),
    "DATALOADER.NUM_WORKERS": Change(2),
    "DATALOADER.TIMEOUT_SECONDS": Change(60, {"DATALOADER.NUM_WORKERS": 1}),
    "DATALOADER.PREFETCH_FACTOR": Change(1, {"DATALOADER.NUM_WORKERS": 1}),
    "DATALOADER.MAX_BAD_IMAGE_SHARE": Change(0),
    "INPUT.TEST.CROP_SIZE_PX": Change(4, EVALUATE),
    "INPUT.TEST.RESIZE_PX": Change(10, EVALUATE),
    "SOLVER.CHECKPOINT_PERIOD": Change(1),
    "SOLVER.CHECKPOINT_MINUTES": Change(1e-9),
    "SOLVER.CHECKPOINT_MAX_TO_KEEP": Change(1, {"SOLVER.CHECKPOINT_PERIOD": 1}),
    "SOLVER.CHECKPOINT_KEEP_EVERY": Change(2, {"SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.CHECKPOINT_MAX_TO_KEEP": 1}),
    "SOLVER.CHECKPOINT_ON_ERROR": Change("continue", {"SOLVER.CHECKPOINT_PERIOD": 1}),
    "SOLVER.CHECKPOINT_IN_BACKGROUND": Change(True, {"SOLVER.CHECKPOINT_PERIOD": 1}),
    "SOLVER.NON_FINITE_MAX_SKIPS": Change(2),
    "DATASETS.TEST": Change("synthetic:num_images=6:num_classes=2:size=12", EVALUATE),
    "TEST.EVALUATORS": Change("()", EVALUATE),
    "TEST.EVAL_PERIOD": Change(2, EVALUATE),
    "TEST.EVAL_AT_START": Change(True, EVALUATE),
    "TEST.IMS_PER_BATCH": Change(2, EVALUATE),
    "TEST.BASELINES": Change("('pixels', 'untrained')", EVALUATE),
    "TEST.BEST_METRIC": Change("knn/top1_k3", EVALUATE),
    "TEST.BEST_METRIC_MODE": Change("min", {**EVALUATE, "TEST.BEST_METRIC": "knn/top1_k3"}),
    "TEST.LABEL_FREE.ALPHA_RANKS": Change("(1, 9)", {**EVALUATE, "TEST.EVALUATORS": "('label_free',)"}),
    "TEST.KNN.TRAIN": Change("synthetic:num_images=12:num_classes=3:size=12:seed=5", EVALUATE),
    "TEST.KNN.K": Change("(2,)", EVALUATE),
    "TEST.KNN.FEATURE": Change("patch", EVALUATE),
    "TEST.KNN.TEMPERATURE": Change(1.0, EVALUATE),
    "TEST.KNN.NUM_PER_CLASS": Change("(2,)", EVALUATE),
    "TEST.KNN.NUM_TRIES": Change(2, {**EVALUATE, "TEST.KNN.NUM_PER_CLASS": "(2,)"}),
    "TEST.KNN.MEMORY_MIB": Change(1, EVALUATE),
    "TEST.KNN.SIMILARITY_DTYPE": Change("bfloat16", EVALUATE),
    "TEST.PRECISE_BN.ENABLED": Change(True, EVALUATE),
    "TEST.PRECISE_BN.NUM_ITER": Change(1, {**EVALUATE, "TEST.PRECISE_BN.ENABLED": True}),
    "COLLAPSE_GUARD.ACTION": Change("off"),
    "COLLAPSE_GUARD.GRACE_ITERS": Change(0),
    "COLLAPSE_GUARD.PATIENCE": Change(1, {"COLLAPSE_GUARD.GRACE_ITERS": 0}),
    "LOG.PERIOD": Change(3),
    "LOG.PROGRESS_BAR": Change(True),
}

TESTED_ELSEWHERE = {
    "VERSION": "config: a file of another version is refused",
    "OUTPUT_DIR": "every run here has another one",
    "DETERMINISTIC": "set-up",
    "CUDNN_BENCHMARK": "set-up; CUDA only",
    "FLOAT32_PRECISION": "set-up; differs on CUDA only",
    "MODEL.META_ARCHITECTURE": "a name; test_docs trains another",
    "MODEL.BACKBONE.NAME": "a name; test_docs trains another",
    "MODEL.DINO_HEAD.NAME": "a name; registries",
    "INPUT.AUGMENTATION": "a name; test_docs trains another",
    "INPUT.AUGMENTATION_BACKEND": "data/test_crop_backends and test_decoded_batch; fast needs OpenCV",
    "INPUT.REDUCED_DECODE": "data/test_reduced_decode; needs OpenCV and large files",
    "SOLVER.OPTIMIZER": "a name; test_docs trains another",
    "MODEL.DEVICE": "set-up, launch",
    "MODEL.ATTENTION": "modeling/backbone/test_vit and layers/test_attention_kernels; kernels need CUDA",
    "MODEL.COMPILE": "modeling/layers/test_compilation; needs a compiler",
    "MODEL.WEIGHTS": "checkpoint",
    "MODEL.WEIGHTS_STRICT": "checkpoint",
    "MODEL.WEIGHTS_WITH_OPTIMIZER": "engine; needs a checkpoint",
    "MODEL.PARALLEL": "engine/test_sharding; several processes",
    "MODEL.FSDP.GROUP_SIZE": "engine/test_sharding; several processes",
    "MODEL.DDP.FIND_UNUSED_PARAMETERS": "parallel; several processes",
    "MODEL.DDP.FP16_COMPRESSION": "parallel; several processes",
    "MODEL.CLASSIFIER.NUM_CLASSES": "meta_arch/test_classifier; no key of pretraining",
    "MODEL.CLASSIFIER.NUM_LAST_BLOCKS": "meta_arch/test_classifier; no key of pretraining",
    "MODEL.CLASSIFIER.MEAN_PATCH": "meta_arch/test_classifier; no key of pretraining",
    "MODEL.CLASSIFIER.FREEZE_BACKBONE": "meta_arch/test_classifier; no key of pretraining",
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": "meta_arch/test_classifier; no key of pretraining",
    "MODEL.CLASSIFIER.MIXUP_ALPHA": "meta_arch/test_classifier; no key of pretraining",
    "MODEL.CLASSIFIER.CUTMIX_ALPHA": "meta_arch/test_classifier; no key of pretraining",
    "DATALOADER.MAX_IMAGE_PIXELS": "data/test_decode, data/test_build; needs files",
    "DATASETS.QUARANTINE": "data/test_quarantine; needs files",
    "DATALOADER.SAMPLE_WEIGHTS": "data/test_build; needs a file",
    "INPUT.FORMAT": "data; changes the number of channels with it",
    "INPUT.VALUE_RANGE": "data/test_channels; with INPUT.FORMAT channels alone",
    "SOLVER.NUM_MICRO_BATCHES": "below, to rounding",
    "TEST.EXPECTED_RESULTS": "evaluation; ends the process",
    "TEST.EARLY_STOPPING_PATIENCE": "engine/test_ssl_trainer, hooks/test_checkpointing; ends the run",
    "TEST.TRAIN_PER_TEST": "evaluation/test_label_sets; no key of pretraining",
    "TEST.LINEAR.TRAIN": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.VAL": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.EPOCHS": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.ITERS": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.IMS_PER_BATCH": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.BASE_LRS": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.NUM_LAST_BLOCKS": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.MEAN_PATCH": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.CROP_SCALE": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.HFLIP_PROB": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.SEED": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.CACHED": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.VAL_PERIOD": "evaluation/test_linear; no key of pretraining",
    "TEST.LINEAR.CHECKPOINT_PERIOD": "evaluation/test_linear; no key of pretraining",
    "TEST.LOGREG.TRAIN": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.VAL": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.HELD_OUT": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.SEED": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.C_LOG10_RANGE": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.NUM_C": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.MAX_LBFGS_ITERS": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.TOL": "evaluation/test_logreg; no key of pretraining",
    "TEST.LOGREG.DTYPE": "evaluation/test_logreg; no key of pretraining",
    **{
        f"TEST.SEGMENTATION.{key}": "evaluation/test_segmentation; needs masks"
        for key in (
            "TRAIN",
            "NUM_LAST_BLOCKS",
            "ITERS",
            "IMS_PER_BATCH",
            "BASE_LR",
            "WARMUP_ITERS",
            "WEIGHT_DECAY",
            "RESIZE_RATIO",
            "HFLIP_PROB",
            "SEED",
        )
    },
    **{
        f"TEST.DENSE_KNN.{key}": "evaluation/test_dense_knn; needs masks"
        for key in ("TRAIN", "K", "TEMPERATURE", "NUM_PATCHES", "BALANCED", "SEED", "MEMORY_MIB")
    },
    "LOG.TENSORBOARD": "writers",
    "LOG.PROFILE_START_ITER": "hooks",
    "LOG.PROFILE_END_ITER": "hooks",
}

Outcome = tuple[list[float], dict[str, Tensor]]
Train = Callable[..., Outcome]


class RecordingTrainer(SSLTrainer):
    """Keeps the loss of every iteration; with ``write_files`` off it saves and logs nothing, which is half the time."""

    write_files = True

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.losses: list[float] = []

    def build_hooks(self) -> list[HookBase | None]:
        writing = () if self.write_files else (hooks.PeriodicCheckpointer, hooks.PeriodicWriter)
        return [hook for hook in super().build_hooks() if not isinstance(hook, writing)]

    def run_step(self) -> None:
        super().run_step()
        self.losses.append(sum(value.item() for name, value in self.last_losses.items() if name.startswith("loss_")))


class SilentTrainer(RecordingTrainer):
    write_files = False


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """(overrides, trainer class) -> losses and final state; each distinct run happens once."""
    done: dict[str, Outcome] = {}

    def run(overrides: Overrides, trainer_class: type[RecordingTrainer]) -> Outcome:
        settings = {**TINY, **BASE, **overrides}
        key = trainer_class.__name__ + repr(sorted((name, str(value)) for name, value in settings.items()))
        if key not in done:
            done[key] = _train(settings, tmp_path_factory.mktemp("run"), trainer_class)
        return done[key]

    return run


def _config(settings: Overrides, folder: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([word for name, value in settings.items() for word in (name, str(value))])
    cfg.OUTPUT_DIR = str(folder)
    validate(cfg)
    return cfg


def _train(settings: Overrides, folder: Path, trainer_class: type[RecordingTrainer]) -> Outcome:
    trainer = trainer_class(_config(settings, folder))
    trainer.resume_or_load(resume=False)
    trainer.train()
    trainer.reset_data_loader(list)  # ends the workers now; the garbage collector may need seconds for each
    assert all(map(math.isfinite, trainer.losses))  # NaN differs from itself and would pass for an effect
    return trainer.losses, {name: value.clone() for name, value in trainer.bare_model.state_dict().items()}


def _equal(first: Outcome, second: Outcome) -> bool:
    return (
        first[0] == second[0]
        and first[1].keys() == second[1].keys()
        and all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    )


def test_every_key_is_in_one_of_the_tables() -> None:
    tables = [CHANGES_TRAINING, LEAVES_TRAINING_ALONE, TESTED_ELSEWHERE]
    assert sorted(key for table in tables for key in table) == sorted(_keys(get_cfg()))


def test_comments_agree_with_the_tables() -> None:
    """What defaults.py promises about results is what is tested here."""
    for entry in docs.read_entries():
        for key, _ in entry.keys:
            if re.search(r"\b[Dd]oes not change results\.", entry.comment):
                assert key not in CHANGES_TRAINING, key
            if re.search(r"\bChanges? results( at other sizes)?\.", entry.comment):
                assert key not in LEAVES_TRAINING_ALONE, key


def test_the_same_settings_give_the_same_bits(train: Train, tmp_path: Path) -> None:
    """Without this the comparisons below would mean nothing."""
    first, silent = train({}, RecordingTrainer), train({}, SilentTrainer)
    again = _train({**TINY, **BASE}, tmp_path, RecordingTrainer)
    assert len(first[0]) == 3
    assert _equal(first, again)
    assert _equal(first, silent)


@pytest.mark.parametrize("key", CHANGES_TRAINING)
def test_key_changes_the_training(key: str, train: Train) -> None:
    change = CHANGES_TRAINING[key]
    usual = train(change.context, SilentTrainer)
    other = train({**change.context, key: change.value}, SilentTrainer)
    assert not _equal(usual, other), f"{key} has no effect"


@pytest.mark.parametrize("key", LEAVES_TRAINING_ALONE)
def test_key_does_not_change_the_training(key: str, train: Train) -> None:
    change = LEAVES_TRAINING_ALONE[key]
    usual = train(change.context, RecordingTrainer)
    other = train({**change.context, key: change.value}, RecordingTrainer)
    assert _equal(usual, other), f"{key} changes the training"


def test_micro_batches_change_rounding_alone(train: Train) -> None:
    context: Overrides = {
        "SOLVER.IMS_PER_BATCH": 4,
        "MODEL.LOSS.KOLEO_GROUP_SIZE": 2,
        "MODEL.LOSS.CENTERING": "sinkhorn_knopp",
    }
    whole = train(context, SilentTrainer)
    parts = train({**context, "SOLVER.NUM_MICRO_BATCHES": 2}, SilentTrainer)
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)


def test_a_run_leaves_no_worker_process_behind(tmp_path: Path) -> None:
    """Else workers idle through the final evaluation, and a later run of the process waits for them at random."""
    before = set(multiprocessing.active_children())
    trainer = SilentTrainer(_config({**TINY, **BASE, "DATALOADER.NUM_WORKERS": 1}, tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.train()
    left = set(multiprocessing.active_children()) - before
    trainer.reset_data_loader(list)
    assert left == set()
