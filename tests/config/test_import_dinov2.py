from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dinoengine.config import CfgNode, ConfigError, get_cfg, validate
from dinoengine.config.config import flatten, unflatten
from dinoengine.config.import_dinov2 import ImportedConfig, import_dinov2_config

ROOT = Path(__file__).resolve().parent.parent.parent

# The published training files, as differences from its defaults (facts, see docs/numerics.md for what differs).
PUBLISHED = {
    "vitl16_short": ({"student.block_chunks": 4}, 32),
    "vitl14": (
        {
            "dino.head_n_prototypes": 131072,
            "dino.head_bottleneck_dim": 384,
            "ibot.separate_head": True,
            "ibot.head_n_prototypes": 131072,
            "train.batch_size_per_gpu": 32,
            "train.dataset_path": "ImageNet22k",
            "train.centering": "sinkhorn_knopp",
            "student.arch": "vit_large",
            "student.patch_size": 14,
            "student.drop_path_rate": 0.4,
            "student.ffn_layer": "swiglufused",
            "student.block_chunks": 4,
            "teacher.momentum_teacher": 0.994,
            "optim.epochs": 500,
            "optim.weight_decay_end": 0.2,
            "optim.base_lr": 2e-4,
            "optim.warmup_epochs": 80,
            "optim.layerwise_decay": 1.0,
            "crops.local_crops_size": 98,
        },
        96,
    ),
}
PUBLISHED["vitg14"] = ({**PUBLISHED["vitl14"][0], "student.arch": "vit_giant2", "train.batch_size_per_gpu": 12}, 256)


def _import(folder: Path, values: dict[str, Any], num_gpus: int | None = 1) -> ImportedConfig:
    path = folder / "meta.yaml"
    path.write_text(yaml.safe_dump(unflatten(values)), encoding="utf-8")
    return import_dinov2_config(str(path), num_gpus)


def _load(folder: Path, text: str) -> CfgNode:
    (folder / "out.yaml").write_text(text, encoding="utf-8")
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "out.yaml"))
    return cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_become_the_shipped_recipes(tmp_path: Path, name: str) -> None:
    values, num_gpus = PUBLISHED[name]
    imported = _import(tmp_path, values, num_gpus)
    ours = get_cfg()
    ours.merge_from_file(str(ROOT / "configs" / "dinov2" / f"{name}.yaml"))
    theirs = dict(flatten(imported.cfg))
    different = {key for key, value in flatten(ours) if value != theirs[key]}
    # Datasets and evaluation during training are ours: the published code names datasets of its own, and evaluates none.
    assert different <= {"DATASETS.TRAIN", "DATASETS.TEST", "TEST.EVAL_PERIOD", "TEST.KNN.TRAIN"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_loads_to_the_same_config_and_validates(tmp_path: Path, name: str) -> None:
    values, num_gpus = PUBLISHED[name]
    imported = _import(tmp_path, values, num_gpus)
    assert _load(tmp_path, imported.text) == imported.cfg
    assert validate(imported.cfg, num_gpus) == []


def test_epochs_become_iterations_and_batches_global(tmp_path: Path) -> None:
    values = {
        "train.OFFICIAL_EPOCH_LENGTH": 100,
        "train.batch_size_per_gpu": 6,
        "optim.epochs": 20,
        "optim.warmup_epochs": 2.5,
        "optim.freeze_last_layer_epochs": 0,
        "teacher.warmup_teacher_temp_epochs": 3,
    }
    cfg = _import(tmp_path, values, 4).cfg
    assert cfg.SOLVER.IMS_PER_BATCH == 24
    assert cfg.MODEL.LOSS.KOLEO_GROUP_SIZE == 6
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.FREEZE_LAST_LAYER_ITERS) == (2000, 250, 0)
    assert cfg.MODEL.TEACHER.TEMP_WARMUP_ITERS == 300
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 300


@pytest.mark.parametrize(
    "theirs, value, ours, expected",
    [
        ("student.arch", "vit_small", "MODEL.VIT.SIZE", "small"),
        ("student.layerscale", None, "MODEL.VIT.LAYER_SCALE_INIT", 0.0),
        ("student.layerscale", "1e-4", "MODEL.VIT.LAYER_SCALE_INIT", 1e-4),  # YAML reads 1e-4 as a text
        ("student.pretrained_weights", "w.pth", "MODEL.WEIGHTS", "w.pth"),
        ("optim.adamw_beta2", 0.95, "SOLVER.BETAS", (0.9, 0.95)),
        ("crops.global_crops_size", [224, 448], "INPUT.GLOBAL_CROPS.SIZE_PX", (224, 448)),
        ("train.output_dir", "runs/a", "OUTPUT_DIR", "runs/a"),
        (
            "train.dataset_path",
            "ImageNet:split=TRAIN:root=/d/in1k:extra=/d/extra",
            "DATASETS.TRAIN",
            ("ImageNet:split=TRAIN:root=/d/in1k:extra=/d/extra",),
        ),
    ],
)
def test_single_keys(tmp_path: Path, theirs: str, value: Any, ours: str, expected: Any) -> None:
    cfg = _import(tmp_path, {"optim.epochs": 100, theirs: value}).cfg
    assert dict(flatten(cfg))[ours] == expected


@pytest.mark.parametrize(
    "dtype, enabled, precision", [("fp16", True, "fp16"), ("bf16", True, "bf16"), ("fp32", False, "bf16")]
)
def test_precision_is_that_of_the_students_backbone(tmp_path: Path, dtype: str, enabled: bool, precision: str) -> None:
    cfg = _import(tmp_path, {"compute_precision.student.backbone.mixed_precision.param_dtype": dtype}).cfg
    assert (enabled, precision) == (cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION)


def test_every_key_is_translated_or_named(tmp_path: Path) -> None:
    given = {
        "optim.epochs": 100,
        "optim.lr": 0.0,
        "train.cache_dataset": True,
        "train.dataset_path": "ImageNet:split=TRAIN:root=/d",
        "compute_precision.teacher.dino_head.mixed_precision.param_dtype": "fp16",
        "student.block_chunks": 4,
        "student.drop_path": 0.1,
        "nb_knn": [10, 20],
    }
    imported = _import(tmp_path, given)
    dropped = dict(imported.dropped)
    assert set(dropped) == set(given) - {"optim.epochs", "train.dataset_path"}  # these two are translated
    assert "did you mean 'student.drop_path_rate'" in dropped["student.drop_path"]
    assert "[10, 20]" in dropped["nb_knn"]
    assert "published sharding" in dropped["student.block_chunks"]


def test_a_dataset_without_a_folder_of_images_is_named(tmp_path: Path) -> None:
    assert dict(_import(tmp_path, {"optim.epochs": 100}).dropped).keys() == {"train.dataset_path"}
    reason = dict(_import(tmp_path, {"train.dataset_path": "ImageNet:split=TRAIN:extra=/d"}).dropped)
    assert "names no folder (root=); set DATASETS.TRAIN" in reason["train.dataset_path"]


@pytest.mark.parametrize("text", ["ImageNet:split=VAL:root=/d:extra=/e:fold=2", "ImageNet22k:root=/d:extra=/e"])
def test_a_dataset_string_is_kept_as_it_is(tmp_path: Path, text: str) -> None:
    imported = _import(tmp_path, {"train.dataset_path": text})
    assert (imported.cfg.DATASETS.TRAIN, imported.dropped) == ((text,), [])


def test_comments_name_the_key_and_whether_the_file_had_it(tmp_path: Path) -> None:
    lines = _import(tmp_path, {"optim.epochs": 100}).text.splitlines()
    (max_iter,) = [line for line in lines if "MAX_ITER" in line]
    (base_lr,) = [line for line in lines if "BASE_LR" in line]
    assert max_iter.split("#")[1].strip() == "optim.epochs"
    assert base_lr.split("#")[1].strip() == "optim.base_lr (published default)"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"student.arch": "vit_huge"}, "student.arch 'vit_huge' is not one of vit_small"),
        ({"student.ffn_layer": "identity"}, "student.ffn_layer 'identity' is not one of mlp"),
        ({"optim.scaling_rule": "linear_wrt_256"}, "optim.scaling_rule 'linear_wrt_256'"),
        ({"optim.warmup_epochs": 0.0001}, "optim.warmup_epochs x train.OFFICIAL_EPOCH_LENGTH must be a whole number"),
        ({"optim.epochs": "many"}, "optim.epochs .* must be a whole number, got 'many'"),
        ({"optim.epochs": float("nan")}, "optim.epochs .* must be a whole number"),
        ({"train.batch_size_per_gpu": 1}, "leaves KoLeo no second image"),
        ({"MODEL.WEIGHTS": "a", "student.pretrained_weights": "b"}, "both name weights"),
        ({"optim.epochs": 1, "train.output_dir": "${hydra.dir}"}, "train.output_dir is .*resolve it first"),
        ({"optim.epochs": 1, "optim.base_lr": "high"}, "SOLVER.BASE_LR takes a number, got 'high'"),
        ({"student.patch_size": 14}, "INPUT.LOCAL_CROPS.SIZE_PX .* not a multiple"),
        ({"compute_precision.student.backbone.mixed_precision.param_dtype": "fp8"}, "'fp8' is not one of fp16"),
        ({"optim.epochs": 1, "gram.use_loss": True}, "no DINOv2 config: gram"),
        ({"SOLVER.MAX_ITER": 5}, "it has no key of DINOv2's"),
        ({"MODEL.WEIGHTS": "x.pth"}, "it has no key of DINOv2's"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _import(tmp_path, values)


def test_all_problems_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _import(tmp_path, {"student.arch": "x", "optim.epochs": 0.00001, "train.batch_size_per_gpu": 1})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("num_gpus", [None, 0, -1])
def test_the_number_of_gpus_must_be_given(tmp_path: Path, num_gpus: int | None) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size_per_gpu 64 is per GPU: give .*--num-gpus N"):
        _import(tmp_path, {"optim.epochs": 1}, num_gpus)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "expected a mapping of keys, got NoneType"),
        ("- 1\n", "got list"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("dino:\n", "it has no key of DINOv2's"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        import_dinov2_config(str(path), 1)
    with pytest.raises(FileNotFoundError):
        import_dinov2_config(str(tmp_path / "missing.yaml"), 1)


def test_a_heading_without_keys_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("crops:\noptim: {epochs: 2}\n")
    assert "crops" not in dict(import_dinov2_config(str(path), 1).dropped)
